"""YAML files of settings, read without the libraries that the settings are for."""

import os
from pathlib import Path
from typing import Any

import yaml

RECIPE_HINT = "give the path of a YAML file, for example recipes/demo/attn_r16.yaml"


def read_yaml(
    path: str | os.PathLike, what: str = "recipe", hint: str = RECIPE_HINT
) -> dict[str, Any]:
    """Read a flat YAML mapping.

    ValueError if the file is missing (with `hint`), is not YAML or is no mapping.
    """
    if not Path(path).is_file():
        raise ValueError(f"{what} {path} not found: {hint}")
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold 'field: value' lines, got {type(settings).__name__}")
    return settings
