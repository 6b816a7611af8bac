"""Which fields of a recipe belong to its data set, and fall where another one is named?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftlab.config.data_words import single_names
from sftlab.field_words import field_words
from sftlab.schema import read_object

_OF_THE_DATA_SET = (
    "dataset_config",
    "dataset_train_split",
    "dataset_shape",
    "dataset_fraction",
    "datasets_stopping_strategy",
    "columns",
    "dataset_text_from_numbers",
    "validation_file",
    "test_file",
    "dataset_validation_split",
    "dataset_test_split",
)
# fields that say which data set it is: one of them at a time
_NAMES = ("dataset_name", "datasets")


def without_replaced_data(
    settings: dict[str, Any], argv: Sequence[str], named: Sequence[str]
) -> tuple[dict[str, Any], str | None]:
    """Returns a recipe's settings without those of a data set that the command line replaces.

    Also returns a line that says so, or None. `named` are the fields on the command line. Tokens of
    the recipe's own data set keep its settings.
    """
    old, words = _settings_name(settings), field_words(argv)
    new = next((words[name] for name in _NAMES if words.get(name)), None)
    if not old or not new or old == new:
        return settings, None
    if _made_from(new[0]) == old:
        mixture = (*_NAMES, "datasets_stopping_strategy")
        return {name: value for name, value in settings.items() if name not in mixture}, None
    fall = [n for n in _OF_THE_DATA_SET if settings.get(n) is not None and n not in named]
    kept = {name: value for name, value in settings.items() if name not in (*fall, *_NAMES)}
    if not fall:
        return kept, None
    said = ", ".join(f"{name} {_shown(settings[name])}" for name in fall)
    line = f"{said} of the recipe belongs to {' '.join(old)} and does not hold for {' '.join(new)}"
    return kept, line


def _settings_name(settings: dict[str, Any]) -> list[str]:
    """Returns the names of the recipe's data sets, as words of a command line."""
    found = next((settings[name] for name in _NAMES if settings.get(name)), [])
    words = found if isinstance(found, list) else [found]
    return [str(one.get("name")) if isinstance(one, dict) else str(one) for one in words]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={one}" for name, one in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _made_from(name: str) -> list[str] | None:
    """Returns the names of the data sets that a folder of tokens was made from, or None."""
    try:
        manifest = read_object(Path(name) / "manifest.json")
        return single_names(manifest["settings"]["dataset_name"])
    except (ValueError, KeyError, TypeError):
        return None
