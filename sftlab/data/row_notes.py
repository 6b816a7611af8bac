"""What rows hold besides the text that is trained on, counted over a whole data set."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Dataset

from sftlab.data.formats import DATA_FORMATS
from sftlab.data.messages import EARLY, OF_OTHERS, SHADOWED, Conversation

SYSTEM, TURNS, THOUGHTS = "system prompts", "earlier turns", "thoughts"
TOOLS, ONLY_CALLS = "tools", "answers that are tool calls alone"
THOUGHTS_END = "</think>"
FIELD = "field "
_WITH = "with "
# a column whose heading is blank, as pandas writes its index
NAMELESS = "without a name"
# fields of messages that are text to learn from
_LEARNED = ("tools", "tool_calls", "reasoning_content", "reasoning", "thinking", "channel")
# columns and messages whose absence changes what is learned
_MATTER = {
    EARLY.split(" ", 1)[1],
    OF_OTHERS,
    *(f"of a message that has {read} too" for _, read in SHADOWED),
    *("tools", "functions", "system", "system_prompt", "instruction", "input", "context"),
    *("history", "loss_mask", "images", "image", "audio", "documents", "chat_template_kwargs"),
    *("label", "rejected", "non_preferred_output", "reasoning", "reasoning_content", "thinking"),
    *("role", "from", "parent_id", "weight"),
}


def unused_parts(row: Mapping[str, Any], data_format: str) -> list[str]:
    """Returns the columns of a row that are not trained on. Empty ones do not count."""
    needed, optional, _ = DATA_FORMATS[data_format]
    unused = [c for c in row if c not in (*needed, *optional) and not _empty(row[c])]
    return [f"column {name or NAMELESS}" for name in unused]


def _empty(value: Any) -> bool:
    return not value if isinstance(value, list | dict | str) else value is None


def parts_of(part: Conversation) -> list[str]:
    """Returns which of the parts that templates treat in their own ways a conversation has."""
    messages, answers = part.messages, [part.messages[number] for number in part.answers]
    roles = [message["role"] for message in messages]
    found = {
        SYSTEM: "system" in roles,
        TURNS: "assistant" in roles[: part.answers[-1]],
        THOUGHTS: any(THOUGHTS_END in one["content"] for one in answers),
        TOOLS: bool(part.tools),
        ONLY_CALLS: any(not one["content"].strip() for one in answers),
    }
    fields = dict.fromkeys(FIELD + name for one in messages for name in one)
    found |= {name: name not in (FIELD + "role", FIELD + "content") for name in fields}
    return [_WITH + name for name, there in found.items() if there]


def unused_columns(rows: Dataset, data_format: str) -> dict[str, int]:
    """Returns the columns of typed rows that are not trained on, with the rows that fill them."""
    needed, optional, _ = DATA_FORMATS[data_format]
    table = rows.data
    unused = [c for c in rows.column_names if c not in (*needed, *optional)]
    filled = {c: len(rows) - table.column(c).null_count for c in unused}
    return {f"column {n or NAMELESS}": max(0, count) for n, count in filled.items() if count > 0}


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
    matters = [name for name in not_used if name.split(" ", 1)[1] in _MATTER]
    others = [name for name in not_used if name not in matters]
    lines = []
    if matters:
        listed = ", ".join(f"{name} ({not_used[name]:,} rows)" for name in matters)
        would = [n for n in matters if n.split(" ", 1)[1] in set(written)]
        tail = f" (the chat template would write {', '.join(would)})" if would else ""
        lines.append(f"warning: not used in training: {listed}{tail}")
    if others:
        listed = ", ".join(f"{name} ({not_used[name]:,} rows)" for name in others)
        lines.append(f"columns and fields that no training uses: {listed}")
    return lines


def fields_of(rows_with: Mapping[str, int]) -> dict[str, int]:
    """Returns the fields of messages and `tools` that rows have, with their numbers of rows."""
    found = {n.removeprefix(FIELD): c for n, c in rows_with.items() if n.startswith(FIELD)}
    return found | ({"tools": rows_with[TOOLS]} if TOOLS in rows_with else {})


def unwritten(rows_with: Mapping[str, int], written: Iterable[str]) -> tuple[list[str], list[str]]:
    """Returns warnings and remarks about fields of messages that the chat template leaves out.

    `written` are the names that it writes. Raises ValueError where it leaves out tool calls that
    are whole answers.
    """
    missing = {n: c for n, c in fields_of(rows_with).items() if n not in set(written)}
    if "tool_calls" in missing and (rows := rows_with.get(ONLY_CALLS)):
        raise ValueError(
            f"the answers of {rows:,} rows are tool calls alone, and the chat template writes none "
            "of them: give a template for tools with --chat_template_path, or leave the rows out"
        )
    learned = [f"{n} ({c:,} rows)" for n, c in missing.items() if n in _LEARNED]
    others = [f"{n} ({c:,} rows)" for n, c in missing.items() if n not in _LEARNED]
    warnings = [f"the chat template does not write {', '.join(learned)}"] if learned else []
    remarks = [f"fields that the chat template does not write: {', '.join(others)}"]
    return warnings, remarks if others else []
