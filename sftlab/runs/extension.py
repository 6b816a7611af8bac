"""A run that trains on to a larger number of steps or epochs than it began with."""

import copy
from collections.abc import Mapping
from typing import Any

# learning rates that do not depend on the last step, where the warmup is a number of steps
_OPEN = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau")


def _length(recipe: Mapping[str, Any]) -> tuple[str, float]:
    """Returns the field that says how long a run is, and its value."""
    steps = recipe.get("max_steps") or -1
    field = "max_steps" if steps > 0 else "num_train_epochs"
    return field, recipe.get(field) or 0


def refuse_extension(record: Mapping[str, Any], recipe: Mapping[str, Any], folder: object) -> None:
    """Raise ValueError where a finished run cannot be continued to the length of `recipe`."""
    (old, before), (new, after) = _length(record["recipe"]), _length(recipe)
    if old != new or after <= before:
        raise ValueError(
            f"extend is true, and {folder} has finished {old} {before:g}: pass a larger --{old}"
        )
    if recipe.get("dataset_streaming"):
        raise ValueError(
            f"{folder} read a stream, whose place depends on max_steps: it cannot be extended; "
            "train on with --adapter_name_or_path and another --output_dir"
        )
    if early := (record.get("measured") or {}).get("stopped_early"):
        raise ValueError(f"{folder} {early}: it would stop there again")


def steps_of(recipe: Mapping[str, Any]) -> int | None:
    """Returns the steps that a recipe asks for; None where it counts epochs."""
    field, value = _length(recipe)
    return int(value) if field == "max_steps" else None


def extended(must: Mapping[str, Any], recipe: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Returns what must be the same, with the length of `recipe` where that is larger.

    Also returns a sentence about what differs from one run of that length; '' where nothing does.
    """
    must = copy.deepcopy(dict(must))
    (old, before), (new, after) = _length(must["recipe"]), _length(recipe)
    if old != new or after <= before:
        return must, ""
    must["recipe"][old] = after
    schedule, warmup = str(recipe.get("lr_scheduler_type")), recipe.get("warmup_steps") or 0
    if schedule in _OPEN and (warmup >= 1 or not warmup):
        return must, ""
    why = f"its {schedule} schedule" if schedule not in _OPEN else f"its warmup_steps {warmup:g}"
    return must, (
        f"a larger {old} ({before:g} was, {after:g} is), on which {why} depends: the learning "
        "rates until here are those of the shorter run"
    )
