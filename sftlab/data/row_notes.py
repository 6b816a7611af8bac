"""What rows hold besides the text that is trained on, counted over a whole data set."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Dataset

from sftlab.data.formats import DATA_FORMATS, Message

SYSTEM, TURNS, THOUGHTS = "system prompts", "earlier turns", "thoughts"
THOUGHTS_END = "</think>"
_USED_FIELDS = {"from", "value", "role", "content"}
# fields that say whether a turn is trained on; at these values it is, as it is here
_TRAINED = dict.fromkeys(("weight", "train", "trainable", "loss"), (1, None, ""))
_WITH = "with "
# columns and fields whose absence changes what is learned
_MATTER = {
    *("tools", "functions", "system", "system_prompt", "instruction", "input", "context"),
    *("history", "loss_mask", "images", "image", "audio", "documents", "chat_template_kwargs"),
    *("tool_calls", "function_call", "tool_call_id", "name", "weight", "train", "trainable"),
    *("loss", "reasoning_content", "reasoning", "thinking", "thought"),
}


def unused_parts(row: Mapping[str, Any], data_format: str) -> list[str]:
    """Returns the columns of a row, and the fields of its messages, that are not trained on.

    Empty ones do not count.
    """
    needed, optional, _ = DATA_FORMATS[data_format]
    columns = [c for c in row if c not in (*needed, *optional) and not _empty(c, row[c])]
    fields: dict[str, None] = {}
    for column in needed:
        messages = row.get(column)
        for message in messages if isinstance(messages, list) else []:
            if isinstance(message, dict):
                fields |= {
                    name: None
                    for name in message
                    if name not in _USED_FIELDS and not _empty(name, message[name])
                }
    return [f"column {name}" for name in columns] + [f"field {name}" for name in fields]


def _empty(name: str, value: Any) -> bool:
    if isinstance(value, list | dict | str):
        return not value
    return value in _TRAINED.get(name, (None,))


def parts_of(prompt: list[Message], response: str) -> list[str]:
    """Returns which of the parts that templates treat in their own ways a row has."""
    roles = [message["role"] for message in prompt]
    found = {
        SYSTEM: "system" in roles,
        TURNS: "assistant" in roles,
        THOUGHTS: THOUGHTS_END in response,
    }
    return [_WITH + name for name, there in found.items() if there]


def unused_columns(rows: Dataset, data_format: str) -> dict[str, int]:
    """Returns the columns of typed rows that are not trained on, with the rows that fill them."""
    needed, optional, _ = DATA_FORMATS[data_format]
    table = rows.data
    unused = [c for c in rows.column_names if c not in (*needed, *optional)]
    filled = {c: len(rows) - table.column(c).null_count for c in unused}
    return {f"column {name}": max(0, count) for name, count in filled.items() if count > 0}


def count_notes(noted: Iterable[tuple[str, int]]) -> dict[str, dict[str, int]]:
    """Returns `not_used` and `rows_with` for run.json from notes and their numbers of rows."""
    counted: Counter[str] = Counter()
    for notes, rows in noted:
        for note in filter(None, notes.split("\n")):
            counted[note] += rows
    with_ = {n.removeprefix(_WITH): c for n, c in counted.items() if n.startswith(_WITH)}
    unused = {name: count for name, count in counted.items() if not name.startswith(_WITH)}
    return {"not_used": dict(sorted(unused.items())), "rows_with": dict(sorted(with_.items()))}


def unused_lines(not_used: Mapping[str, int], written: Iterable[str] = ()) -> list[str]:
    """Returns one line for what matters to the training, one for other columns; none for nothing.

    `written` are the names that the chat template would write if they were used.
    """
    matters = [n for n in not_used if n.split(" ", 1)[1] in _MATTER or n.startswith("field")]
    others = [name for name in not_used if name not in matters]
    lines = []
    if matters:
        listed = ", ".join(f"{name} ({not_used[name]:,} rows)" for name in matters)
        would = [n for n in matters if n.split(" ", 1)[1] in set(written)]
        tail = f" (the chat template would write {', '.join(would)})" if would else ""
        lines.append(f"warning: not used in training: {listed}{tail}")
    if others:
        listed = ", ".join(f"{name} ({not_used[name]:,} rows)" for name in others)
        lines.append(f"columns that no training uses: {listed}")
    return lines
