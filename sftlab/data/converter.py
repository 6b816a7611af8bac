"""Rows of one data format become conversations, each in a split, with notes of what they hold."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from datasets import Features, List, Value

from sftlab.data.formats import DATA_FORMATS
from sftlab.data.messages import Conversation, Message, is_empty
from sftlab.data.row_notes import parts_of
from sftlab.data.row_reading import RowReader
from sftlab.data.text_rows import JSON_ROW

# Messages are JSON: a column of structs would give every message the fields of all others.
FEATURES = Features(
    {
        "messages": Value("string"),
        "tools": Value("string"),
        "answers": List(Value("int32")),
        "opening": Value("int64"),
        "conversation": Value("int64"),
        "split": Value("int8"),
        "row_hash": Value("string"),
        "notes": Value("string"),
    }
)
COLUMNS = tuple(FEATURES)
# what a pair has besides: the answer in place of the chosen one
PAIRS = "preference"
REJECTED = "rejected"
PAIR_FEATURES = Features({**FEATURES, REJECTED: Value("string")})
# what a split keeps
TEXT_COLUMNS = ("messages", "tools", "answers", "opening", "conversation")
# `split` of rows that are in none: without a response, or without any answer to a user
NO_RESPONSE, NO_TURN = -1, -2
# pairs whose sides are equal
EQUAL_SIDES = -3
TEST = 2
# json.dumps would make an encoder for every call
_WRITTEN = json.JSONEncoder(ensure_ascii=False).encode
_SORTED = json.JSONEncoder(ensure_ascii=False, sort_keys=True).encode
# `conversation` counts the rows of each of several data sets from a multiple of it
MOST_ROWS = 1 << 40


class Converter:
    """Turns a batch of rows in one data format into conversations.

    `loss_on` is the recipe's: under `all` a conversation is one row, under `last` too, with its
    last answer in the loss, and under `completion` it is a row for each answer. Test rows hold one
    answer each, whatever `loss_on` is. An answer without text gives a row with split `NO_RESPONSE`,
    a row without any answer one with `NO_TURN`. `conversation` is the number of the source's row;
    those of data set number `source` begin at `source` times `MOST_ROWS`. It can be pickled, and
    `datasets` hashes it for its cache.
    """

    def __init__(
        self, reader: RowReader, fractions: tuple[float, ...], loss_on: str, source: int = 0
    ) -> None:
        self.reader, self.fractions, self.loss_on, self.source = reader, fractions, loss_on, source
        self.version = 5  # of what it makes: caches of other versions are not read

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        names = (*COLUMNS, REJECTED) if self.reader.data_format == PAIRS else COLUMNS
        out: dict[str, list] = {name: [] for name in names}
        for offset, index in enumerate(indices):
            try:
                row, notes = self.reader.read(batch, offset)
                needed, _, read = DATA_FORMATS[self.reader.data_format]
                row = row if JSON_ROW in batch else dict.fromkeys(needed) | without_nulls(row)
                conversation = read(row)
                notes += conversation.notes
                for values in self._rows(conversation):
                    notes += values.pop("parts", [])
                    number = self.source * MOST_ROWS + index
                    values |= {"conversation": number, "notes": "\n".join(notes)}
                    for name in names:
                        out[name].append(values.get(name))
                    notes = []
            except (TypeError, ValueError, KeyError) as error:
                place = f"{self.reader.place(index)} ({self.reader.data_format})"
                raise ValueError(f"{place}: {error}") from error
        return out

    def _rows(self, conversation: Conversation) -> Iterator[dict[str, Any]]:
        """Yield what becomes of a conversation: rows in a split, and rows in none."""
        messages, answers = conversation.messages, conversation.answers
        nothing = {"messages": "[]", "tools": "", "answers": [], "opening": 0, "row_hash": ""}
        if not answers:
            yield nothing | {"split": NO_TURN}
            return
        if conversation.rejected and conversation.rejected == messages[-1:]:
            yield nothing | {"split": EQUAL_SIDES}
            return
        spoken = [number for number in answers if not is_empty(messages[number])]
        if any(map(is_empty, conversation.rejected)):
            spoken = []
        for _ in range(len(answers) - len(spoken)):
            yield nothing | {"split": NO_RESPONSE}
        key = opening_key(messages)
        split = _split_of(key, self.fractions)
        if split != TEST and self.loss_on == "last":
            spoken = spoken[-1:]
        one_row = split != TEST and self.loss_on != "completion"
        for numbers in [spoken] if one_row and spoken else [[number] for number in spoken]:
            part = conversation._replace(messages=messages[: numbers[-1] + 1], answers=numbers)
            written = [_WRITTEN(one) for one in part.messages]
            yield {
                "messages": f"[{', '.join(written)}]",
                "tools": _WRITTEN(part.tools) if part.tools else "",
                "answers": numbers,
                "opening": key,
                "split": split,
                "row_hash": _hash_of(part, written),
                "parts": parts_of(part),
                REJECTED: json.dumps(part.rejected, ensure_ascii=False),
            }


def _hash_of(part: Conversation, written: list[str]) -> str:
    """Returns the hash of a conversation, whose messages are `written` as JSON."""
    messages = [
        text if len(one) == 2 else _SORTED(one)
        for one, text in zip(part.messages, written, strict=True)
    ]
    # of one answer it is that of a prompt and its completion
    text = f"[[{', '.join(messages[:-1])}], [{messages[-1]}]]"
    if len(part.answers) > 1:
        text += json.dumps(part.answers)
    if part.tools:
        text += _SORTED(part.tools)
    if part.rejected:
        text += _SORTED(part.rejected)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def without_nulls(value: Any) -> Any:
    """Returns a value without the None that typed columns fill missing fields with."""
    if isinstance(value, dict):
        return {name: without_nulls(one) for name, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def turn_of(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a converted row of one answer: prompt, completion (messages), tools, conversation."""
    messages, _, tools, *_ = Conversation.from_row(row)
    turn = {"prompt": messages[:-1], "completion": messages[-1:], "tools": tools}
    return turn | {"conversation": row["conversation"]}


def opening(messages: list[Message]) -> str:
    """Returns the first user message of a conversation, with single spaces."""
    return " ".join(
        next(
            (m["content"] for m in messages if m["role"] == "user"), messages[0]["content"]
        ).split()
    )


def opening_key(messages: list[Message]) -> int:
    """Returns 64 bits of the opening's SHA-256, with a sign, as Arrow and `datasets` take them."""
    digest = hashlib.sha256(opening(messages).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def split_index(messages: list[Message], fractions: tuple[float, ...]) -> int:
    """Returns the split of a conversation: 0 train, 1 validation, 2 test.

    It depends on the opening alone, so it is the same on every machine and for every subset.
    Duplicates, the turns of a conversation and a question under several system prompts share it.
    """
    return _split_of(opening_key(messages), fractions)


def _split_of(key: int, fractions: tuple[float, ...]) -> int:
    position = key % 2**64 / 2**64
    return bisect_right(list(accumulate(fractions))[:2], position)
