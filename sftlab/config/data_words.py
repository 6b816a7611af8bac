"""The fields of a recipe that name data sets and columns, as words and as what they mean."""

import difflib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PART = {"name": str, "weight": float, "shape": str, "columns": dict, "config": str, "split": str}


def joined_names(names: str | Sequence[str] | None) -> str | None:
    """Returns the names of several files as one text; `single_names` takes it apart again."""
    if names is None or isinstance(names, str):
        return names
    return names[0] if len(names) == 1 else shlex.join(names)


def single_names(text: str) -> list[str]:
    """Returns the names in a text. A path that exists is one name, blanks or not."""
    if not re.search(r"\s", text.strip()) or Path(text).exists():
        return [text]
    try:
        return shlex.split(text)
    except ValueError:  # a quotation mark that is not closed
        return [text]


def columns_of_words(words: Sequence[str] | Mapping[str, Any] | None) -> dict[str, str] | None:
    """Returns the columns that `question=input answer=output` says.

    Raises ValueError for a word without `=`, and for a column that is named twice.
    """
    if words is None:
        return None
    pairs = list(words.items()) if isinstance(words, Mapping) else []
    for word in [] if isinstance(words, Mapping) else words:
        ours, equals, theirs = word.partition("=")
        if not (ours and equals and theirs):
            raise ValueError(
                f"columns has the word {word!r}: expected the format's column and the file's, for "
                "example question=input"
            )
        pairs.append((ours, theirs))
    for ours, theirs in pairs:
        if not isinstance(theirs, str):
            raise ValueError(f"columns has {theirs!r} for {ours}: expected the name of a column")
    for names in zip(*pairs, strict=True):
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"columns names {twice!r} twice: give every column once")
    return dict(pairs)


def parts_of_words(words: Sequence[Any] | None) -> list[dict[str, Any]] | None:
    """Returns the data sets of a mixture: mappings, JSON of such, or words NAME or NAME=WEIGHT.

    Raises ValueError for a key that is not known, a missing name, and a weight that is no number
    above 0.
    """
    if words is None:
        return None
    parts = [_checked(_part(word)) for word in words]
    weighted = [part["name"] for part in parts if "weight" in part]
    if weighted and len(weighted) < len(parts):
        without = next(part["name"] for part in parts if "weight" not in part)
        raise ValueError(
            f"datasets gives {weighted[0]} a weight and {without} none: give every one a weight, "
            "or none to use all rows once"
        )
    return parts


def _part(word: Any) -> dict[str, Any]:
    if isinstance(word, Mapping):
        return dict(word)
    if str(word).startswith("{"):
        try:
            return json.loads(word)
        except json.JSONDecodeError as error:
            raise ValueError(f"datasets has {word!r}, which is not JSON: {error}") from error
    name, equals, weight = str(word).rpartition("=")
    if not equals:
        return {"name": weight}
    try:
        return {"name": name, "weight": float(weight)}
    except ValueError as error:
        raise ValueError(
            f"datasets has {word!r}: expected NAME or NAME=WEIGHT, for example my.jsonl=2"
        ) from error


def _checked(part: dict[str, Any]) -> dict[str, Any]:
    for key, value in part.items():
        if key not in _PART:
            near = difflib.get_close_matches(key, _PART, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else f": known are {', '.join(_PART)}"
            raise ValueError(f"datasets has the key {key!r}{meant}")
        kinds = (int, float) if _PART[key] is float else _PART[key]
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ValueError(f"datasets has {key}: {value!r}: expected {_WORDS[_PART[key]]}")
    if not part.get("name"):
        raise ValueError("datasets has an entry without a name: give it the name of a data set")
    if not 0 < part.get("weight", 1) < float("inf"):
        raise ValueError(
            f"datasets gives {part['name']} the weight {part['weight']}: it must be a number above "
            "0 (leave the data set out instead of 0)"
        )
    if "columns" in part:
        part["columns"] = columns_of_words(part["columns"])
    return part


_WORDS = {str: "a text", float: "a number", dict: "a mapping such as {question: input}"}
