"""Which field does a study tune for every cell, and with which values?"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sftlab.comparison.study_tasks import Task


def tuned_field(
    path: Path, content: Mapping[str, Any], fields: Mapping[str, Any], kept: Collection[str]
) -> tuple[str, list[float]]:
    """Returns the field that is tuned for every cell, and its values from low to high.

    No field where the study tunes none. `kept` are fields that the study itself sets. Raises
    ValueError where the field has a value already, or fewer than two.
    """
    tune = content.get("tune") or {}
    if not tune:
        return "", []
    if len(tune) > 1:
        raise ValueError(f"{path}: tune names {', '.join(tune)}: expected one field")
    ((name, values),) = tune.items()
    numbers = [_number(one) for one in values] if isinstance(values, list) else []
    if len(set(numbers)) < 2 or None in numbers or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"{path}: tune, {name}: got {values!r}, expected two different numbers or more"
        )
    if name in fields:
        raise ValueError(f"{path} tunes {name}: --{name} or `fields` would say nothing")
    fixed = [cell for cell, own in content["cells"].items() if name in (own or {})]
    if fixed or name in ("seed", *kept):
        raise ValueError(f"{path} tunes {name}, which {fixed[0] if fixed else 'it'} sets already")
    return name, sorted(one for one in numbers if one is not None)


def _number(value: object) -> float | None:
    """Returns a YAML number; YAML reads 1e-3, without a point, as text. None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def at_value(task: Task, field: str, value: float) -> Task:
    """Returns a task with one field set, kept in a folder that names it."""
    folder = task.folder.with_name(f"{task.folder.name}-{field}_{value:g}")
    fields = {**task.fields, field: value}
    return task._replace(name=f"{task.name}, {field} {value:g}", folder=folder, fields=fields)
