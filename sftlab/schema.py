"""JSON objects that were written by this program, read with a check of every value that is used.

An error names the file, the key, what was found and what was expected.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

MISSING = object()


class Kind(NamedTuple):
    """A kind of value: its name in messages, and the test that a value must pass."""

    name: str
    holds: Callable[[Any], bool]

    def or_null(self) -> "Kind":
        """Returns the kind that takes null as well."""
        return Kind(f"{self.name} or null", lambda value: value is None or self.holds(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


TEXT = Kind("a text", lambda value: isinstance(value, str))
COUNT = Kind(
    "an integer of 0 or more",
    lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
)
NUMBER = Kind("a number", _is_number)
FINITE = Kind("a finite number", lambda value: _is_number(value) and math.isfinite(value))
DURATION = Kind("a number of 0 or more", lambda value: _is_number(value) and 0 <= value < 1e15)
BOOLEAN = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
OBJECTS = Kind(
    "a list of objects",
    lambda value: isinstance(value, list) and all(isinstance(one, dict) for one in value),
)


def one_of(*values: str) -> Kind:
    """Returns the kind of these texts."""
    return Kind(f"one of {', '.join(values)}", lambda value: value in values)


def list_of(kind: Kind) -> Kind:
    """Returns the kind of lists whose items are of a kind."""
    return Kind(
        f"a list, each {kind.name}",
        lambda value: isinstance(value, list) and all(kind.holds(one) for one in value),
    )


TEXT_OR_TEXTS = Kind(
    "a text or a list of texts", lambda value: TEXT.holds(value) or list_of(TEXT).holds(value)
)


def read_content(path: Path) -> bytes:
    """Returns the bytes of a file.

    Raises ValueError with the path for a folder, for a pipe or a device, which would be waited for,
    and for a file that cannot be read.
    """
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a pipe or a device"
        raise ValueError(f"{path} cannot be read: it is {what}, expected a file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file. Raises ValueError with the file for anything else."""
    content = read_content(path)
    if not content.strip(b" \t\r\n\0"):
        raise ValueError(f"{path} cannot be read: it is empty, expected a JSON object")
    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=once)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read: it is not text (byte {error.start:,})") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} cannot be read: it is not JSON ({error.msg}, line {error.lineno} column "
            f"{error.colno} of {len(content):,} bytes)"
        ) from error
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise ValueError(f"{path} cannot be read: it is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {shown(found)}, expected a JSON object")
    return found


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object of these keys and values. Raises ValueError for a key that is twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return found


def check(
    content: Mapping[str, Any],
    where: str,
    required: Mapping[str, Kind],
    optional: Mapping[str, Kind] | None = None,
) -> None:
    """Raise ValueError for a key that is missing or has a value of another kind.

    A dot in a key goes into an object: `data.train.rows`. Optional keys may be missing on any
    level, and so may what is in an object that is null.
    """
    for key, kind in required.items():
        value = _at(content, key)
        if value is MISSING:
            raise ValueError(f"{where} has no {key}, expected {kind.name}")
        _hold(where, key, kind, value)
    for key, kind in (optional or {}).items():
        value = _at(content, key)
        if value is not MISSING:
            _hold(where, key, kind, value)


def shown(value: Any) -> str:
    """Returns a value for a message, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _hold(where: str, key: str, kind: Kind, value: Any) -> None:
    if not kind.holds(value):
        raise ValueError(f"{where}: {key} is {shown(value)}, expected {kind.name}")


def _at(content: Mapping[str, Any], key: str) -> Any:
    found: Any = content
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            return MISSING
        found = found[part]
    return found
