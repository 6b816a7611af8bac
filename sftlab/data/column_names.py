"""Which columns of a data set are the question, the answer and the rest?

`--columns question=input answer=output` says it: the format's column first, the file's behind it.
Without it the formats' own names are recognised, and common other names where only one reading is
possible.
"""

import difflib
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from sftlab.data.data_files import data_suffix
from sftlab.data.formats import DATA_FORMATS

# the format's column: the column of the data set that it is read from
Columns = dict[str, str]
_QUESTION = (
    *("prompt", "question", "query", "instruction", "input", "inputs"),
    *("problem", "user", "human"),
)
_ANSWER = (
    *("completion", "response", "answer", "output", "solution", "assistant", "reply"),
    *("target", "targets"),
)
# columns that are proposed as an answer before others, and those that never are
_LIKELY, _NO_ANSWER = ("chosen", "preferred", "answers"), ("id", "label", "tools", "system")
# columns of answers that nobody wants
_REJECTED = re.compile(r"reject|non_?preferred|dispreferred", re.IGNORECASE)
_CONVERSATION = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
_PAIRS = "preference"
_SYSTEM = ("system_prompt", "system")
# other names of columns that a format may have
_OPTIONAL = {
    "system_prompt": _SYSTEM,
    "system": _SYSTEM,
    "context": ("input",),
    "input": ("context",),
}


class HoldPairs(ValueError):
    """Columns are those of preference pairs, where rows of one answer are expected."""


def read_columns(
    found: Sequence[str], data_format: str | None, given: Mapping[str, str], name: str
) -> tuple[str, Columns]:
    """Returns the data format of columns, and the columns that it reads under another name.

    `found` are the columns of the data set `name`, `given` are those of `--columns`. Raises
    ValueError for a column that is not there, and where no format or several formats fit.
    """
    _refuse_unknown(found, given, name)
    there = [*given, *(c for c in found if c not in given and c not in given.values())]
    if data_format is None:
        # pairs are read as such only where the training asks for them
        formats = [one for one in DATA_FORMATS if one != _PAIRS]
        fits = [one for one in formats if _fits(one, there, given)]
        # many data sets have the whole row as text in one more column
        if len(fits) > 1 or (_named(there, _QUESTION) and _named(there, _ANSWER)):
            fits = [one for one in fits if one != "text" or "text" in given]
        if len(fits) > 1:
            raise ValueError(
                f"the columns {', '.join(found)} match the data formats {' and '.join(fits)}: say "
                f"which is meant with dataset_shape, for example --dataset_shape {fits[-1]}; files "
                "of several formats are mixed with --datasets"
            )
        data_format = fits[0] if fits else None
    if data_format is not None and _fits(data_format, there, given):
        return data_format, dict(given) | _optional(data_format, there)
    if data_format is not None:
        raise ValueError(_missing(data_format, found, there))
    data_format, guessed = _guessed(found, there, name)
    sources = {one: given.get(column, column) for one, column in guessed.items()}
    return data_format, sources | _optional(data_format, there)


def used_columns(data_format: str, columns: Mapping[str, str]) -> dict[str, str]:
    """Returns every column of a format with the column of the data set that it is read from."""
    needed, optional, _ = DATA_FORMATS[data_format]
    return {one: columns.get(one, one) for one in (*needed, *optional)}


def as_words(columns: Mapping[str, str]) -> str:
    """Returns columns as one would type them behind `--columns`."""
    return shlex.join(f"{one}={column}" for one, column in columns.items())


def _refuse_unknown(found: Sequence[str], given: Mapping[str, str], name: str) -> None:
    known = {one for needed, optional, _ in DATA_FORMATS.values() for one in (*needed, *optional)}
    for target, column in given.items():
        if target not in known:
            raise ValueError(
                f"columns has {target}={column}, and no data format has a column {target!r}"
                f"{_meant(target, known)}: known are {', '.join(sorted(known))}"
            )
        if column not in found:
            raise ValueError(
                f"columns has {target}={column}, and {name} has no column {column!r}"
                f"{_meant(column, found)}: it has {', '.join(found)}"
            )


def _meant(name: str, known: Sequence[str] | set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _fits(data_format: str, there: Sequence[str], given: Mapping[str, str]) -> bool:
    needed, optional, _ = DATA_FORMATS[data_format]
    return set(needed) <= set(there) and set(given) <= {*needed, *optional}


def _optional(data_format: str, there: Sequence[str]) -> Columns:
    """Returns the columns that a format may have and that are there under one other name."""
    needed, optional, _ = DATA_FORMATS[data_format]
    free = [column for column in there if column not in (*needed, *optional)]
    found = {}
    for one in (one for one in optional if one not in there):
        names = [column for column in free if column.lower() in _OPTIONAL.get(one, ())]
        if len(names) == 1:
            found[one] = names[0]
    return found


def _named(there: Sequence[str], names: Sequence[str]) -> list[str]:
    return [column for column in there if column.lower() in names]


def _guessed(found: Sequence[str], there: Sequence[str], name: str) -> tuple[str, Columns]:
    """Returns the format of common names. Raises ValueError where several readings are possible."""
    questions, answers, conversations, system = (
        _named(there, names) for names in (_QUESTION, _ANSWER, _CONVERSATION, _SYSTEM)
    )
    if len(questions) == len(answers) == 1 and not conversations and len(system) < 2:
        pair = questions + answers
        if system:
            return "openorca", dict(
                zip(("question", "response", "system_prompt"), pair + system, strict=True)
            )
        return "prompt_completion", dict(zip(("prompt", "completion"), pair, strict=True))
    if len(conversations) == 1 and not questions and not answers:
        return "messages", {"messages": conversations[0]}
    known = "; ".join(
        f"{shape} ({', '.join(needed)})" for shape, (needed, _, _) in DATA_FORMATS.items()
    )
    example = f"; a conversation is read with --columns messages={found[0]}"
    if len(found) > 1:
        example = f"; say which column is which, for example --columns {_proposed(found)}"
    table = data_suffix(Path(name)) in (".csv", ".tsv")
    heading = "; the first line of the file must name the columns" * table
    if "input_ids" in found:
        raise ValueError(
            f"the columns {', '.join(found)} are token ids of an unknown tokenizer: give the text, "
            "and slurm/tokenize_dataset.py tokenizes it"
        )
    if any(map(_REJECTED.search, found)):
        raise HoldPairs(
            f"the columns {', '.join(found)} hold preference pairs: train on them with --method "
            "dpo (columns chosen and rejected), or on the wanted answers alone with --columns "
            f"{_proposed(found)}"
        )
    raise ValueError(
        f"the columns {', '.join(found)} match no data format; known are {known}{example}{heading}"
    )


def _proposed(found: Sequence[str]) -> str:
    """Returns columns to type, of which no answer is a rejected one if there is another."""
    questions, answers = _named(found, _QUESTION), _named(found, _ANSWER)
    wanted = [c for c in found if not _REJECTED.search(c)] or list(found)
    likely = [c for c in wanted if c.lower().startswith(_LIKELY)]
    if not questions and likely[:1] == wanted[:1]:  # a wanted conversation, with its question
        return as_words({"messages": likely[0]})
    question = (questions or [c for c in wanted if c not in answers] or found)[0]
    others = [c for c in wanted[::-1] if c.lower() not in _NO_ANSWER]
    answer = next(c for c in [*answers, *likely, *others, *found] if c != question)
    return as_words({"prompt": question, "completion": answer})


def _missing(data_format: str, found: Sequence[str], there: Sequence[str]) -> str:
    """Returns a sentence about the columns that a format needs, with what to type."""
    needed = DATA_FORMATS[data_format][0]
    words = {}
    for one in (one for one in needed if one not in there):
        alike = next((names for names in (_QUESTION, _ANSWER, _CONVERSATION) if one in names), ())
        words[one] = next(iter(_named(there, alike)), "NAME")
    if data_format == _PAIRS:
        return _no_pairs(found, as_words(words))
    return (
        f"dataset_shape {data_format} needs the columns {', '.join(needed)}; found "
        f"{', '.join(found)}: leave dataset_shape out, or say which columns they are with "
        f"--columns {as_words(words)}"
    )


def _no_pairs(found: Sequence[str], words: str) -> str:
    """Returns a sentence about columns without pairs, which `words` would name."""
    if "label" in found and {"chosen", "rejected"}.isdisjoint(found):
        return (
            f"the columns {', '.join(found)} hold one answer and a label a row, and method dpo "
            "trains on pairs: put a wanted and an unwanted answer to the same prompt into one row "
            "(chosen, rejected), or train on the wanted ones alone with --method sft"
        )
    return (
        f"method dpo trains on pairs, in the columns chosen and rejected; found "
        f"{', '.join(found)}: say which columns they are with --columns {words}"
    )
