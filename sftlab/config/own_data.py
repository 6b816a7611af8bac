"""Which fields of a recipe belong to its data set, and fall where another one is named?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftlab.schema import read_object

_OF_THE_DATA_SET = (
    "dataset_config",
    "dataset_train_split",
    "dataset_shape",
    "dataset_fraction",
)


def without_replaced_data(
    settings: dict[str, Any], argv: Sequence[str], named: Sequence[str]
) -> tuple[dict[str, Any], str | None]:
    """Returns a recipe's settings without those of a data set that the command line replaces.

    Also returns a line that says so, or None. `named` are the fields on the command line. Tokens of
    the recipe's own data set keep its settings.
    """
    old, new = settings.get("dataset_name"), _dataset_name(argv)
    if not old or not new or old == new or _made_from(new) == old:
        return settings, None
    fall = [n for n in _OF_THE_DATA_SET if settings.get(n) is not None and n not in named]
    if not fall:
        return settings, None
    said = ", ".join(f"{name} {settings[name]}" for name in fall)
    line = f"{said} of the recipe belongs to {old} and does not hold for {new}"
    return {name: value for name, value in settings.items() if name not in fall}, line


def _dataset_name(argv: Sequence[str]) -> str | None:
    found = None
    for index, argument in enumerate(argv):
        name, _, value = argument.partition("=")
        if name.replace("-", "_") == "__dataset_name":
            found = value or next(iter(argv[index + 1 : index + 2]), None)
    return found


def _made_from(name: str) -> str | None:
    """Returns the data set that a folder of tokens was made from, or None."""
    try:
        return read_object(Path(name) / "manifest.json")["settings"]["dataset_name"]
    except (ValueError, KeyError, TypeError):
        return None
