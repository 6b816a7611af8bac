"""What does a YAML file of settings hold? Read it without importing a heavy library."""

import os
from pathlib import Path
from typing import Any

import yaml

RECIPE_HINT = "give the path of a YAML file, for example recipes/demo/attn_r16.yaml"


def read_yaml(
    path: str | os.PathLike,
    what: str = "recipe",
    hint: str = RECIPE_HINT,
    folder: Path = Path(),
) -> dict[str, Any]:
    """Returns the fields of a flat YAML file; a relative path is taken from `folder`.

    Raises ValueError for a missing file (with `hint`), one that is not YAML, or one without fields.
    """
    file = folder / path
    if not file.is_file():
        raise ValueError(f"{what} {path} not found: {hint}")
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold 'field: value' lines, got {type(settings).__name__}")
    return settings
