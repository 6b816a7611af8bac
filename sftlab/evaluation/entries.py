"""harness.json, alpaca.json and mt_bench.json: a list of entries, one for each evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftlab.schema import read_object


def read_entries(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the entries of a file, [] without one.

    Raises ValueError where it has another form: it would lose its entries if it were written anew.
    """
    if not path.exists():
        return []
    entries = read_object(path).get("entries")
    whole = isinstance(entries, list) and all(isinstance(one, dict) for one in entries)
    if not whole or not all(key in one for one in entries for key in keys):
        holding = f" with {', '.join(keys)}" if keys else ""
        raise ValueError(
            f"{path}, entries: expected a list of objects{holding}; move the file aside, and the "
            "evaluation writes a new one"
        )
    return entries
