"""run.json as it is read: one way for training, evaluation, report, study, app and jobs."""

import os
from pathlib import Path
from typing import Any

from sftlab.schema import (
    BOOLEAN,
    COUNT,
    FINITE,
    NUMBER,
    OBJECT,
    OBJECTS,
    TEXT,
    TEXT_OR_TEXTS,
    Kind,
    check,
    list_of,
    one_of,
    read_object,
)

RECORD = "run.json"
STATUSES = ("running", "succeeded", "failed", "interrupted")


def _is_peak(rank: dict[str, Any]) -> bool:
    kinds = ("allocated_gb", "reserved_gb") if "allocated_gb" in rank else ("resident_gb",)
    step = rank.get("step", {})
    return not rank or (
        all(FINITE.holds(rank.get(kind)) for kind in kinds)
        and isinstance(step, dict)
        and all(map(FINITE.holds, step.values()))
    )


_STEP_AND_LOSS = Kind(
    "a step and a loss",
    lambda value: (
        isinstance(value, list)
        and len(value) == 2
        and COUNT.holds(value[0])
        and NUMBER.holds(value[1])
    ),
)
_HOST_AND_PROCESS = Kind(
    "a host and a process id",
    lambda value: (
        isinstance(value, list)
        and len(value) == 2
        and TEXT.holds(value[0])
        and COUNT.holds(value[1])
    ),
)
_WORDS = Kind(
    "an object of texts and numbers",
    lambda value: (
        isinstance(value, dict)
        and all(one is None or isinstance(one, str | int | float) for one in value.values())
    ),
)
# of a rank: a GPU's memory, or a CPU's
_PEAKS = Kind(
    "a list of objects, each with resident_gb, or allocated_gb and reserved_gb",
    lambda value: OBJECTS.holds(value) and all(map(_is_peak, value)),
)
_COLLECTIVES = Kind(
    "an object of calls and mb for each kind",
    lambda value: (
        isinstance(value, dict)
        and all(
            isinstance(one, dict) and all(FINITE.holds(one.get(name)) for name in ("calls", "mb"))
            for one in value.values()
        )
    ),
)
_REQUIRED = {"status": one_of(*STATUSES), "recipe": OBJECT, "launch": OBJECT}
_REQUIRED_OF_SUCCEEDED = {"recipe.model_name_or_path": TEXT, "template.hash": TEXT}
_OPTIONAL = {
    "reason": TEXT.or_null(),
    "failed_rank": COUNT.or_null(),
    "started": TEXT.or_null(),
    "finished": TEXT.or_null(),
    "interruptions": OBJECTS,
    "host_pid": _HOST_AND_PROCESS.or_null(),
    "versions": _WORDS,
    "git_commit": TEXT.or_null(),
    "hardware": _WORDS,
    "recipe.model_name_or_path": TEXT,
    "recipe.model_revision": TEXT.or_null(),
    "recipe.dataset_name": TEXT.or_null(),
    "recipe.dataset_config": TEXT.or_null(),
    "recipe.max_length": COUNT.or_null(),
    "recipe.max_steps": FINITE,
    "recipe.num_train_epochs": FINITE,
    "recipe.global_batch_size": COUNT.or_null(),
    "recipe.lora_r": COUNT.or_null(),
    "recipe.lora_target_modules": TEXT_OR_TEXTS.or_null(),
    "recipe.load_in_4bit": BOOLEAN.or_null(),
    "recipe.load_in_8bit": BOOLEAN.or_null(),
    "recipe.dtype": TEXT.or_null(),
    "launch.precision": TEXT.or_null(),  # a script started without a launch config
    "launch.strategy": TEXT,
    "launch.world_size": COUNT,
    "data": OBJECT.or_null(),
    **{f"data.{split}.rows": COUNT.or_null() for split in ("train", "validation", "test")},
    **{f"data.{split}.fingerprint": TEXT.or_null() for split in ("train", "validation", "test")},
    "data.tokenized": OBJECT.or_null(),
    "template": OBJECT.or_null(),
    "template.hash": TEXT,
    "ran": OBJECT.or_null(),
    "measured": OBJECT.or_null(),
    **{
        f"measured.{name}": FINITE.or_null()
        for name in (
            *("tokens_per_s", "rows_per_s", "share_of_limit", "train_seconds"),
            *("global_step", "step_time_s"),
        )
    },
    # a training that diverged has no finite ones
    **{
        f"measured.{name}": NUMBER.or_null()
        for name in ("train_loss", "validation_loss", "validation_perplexity")
    },
    "measured.peak_memory": _PEAKS,
    "measured.collectives": _COLLECTIVES.or_null(),
    "ran.lora_scale": list_of(NUMBER),
    "losses": list_of(_STEP_AND_LOSS),
}


def read_run(folder: str | os.PathLike) -> dict[str, Any]:
    """Read run.json of a run directory.

    Raises ValueError where there is none, and where it is damaged: with the key, what was found and
    what was expected.
    """
    path = Path(folder) / RECORD
    if not os.path.lexists(path):
        raise ValueError(f"{folder} is no run directory: it has no run.json")
    record = read_object(path)
    check(record, str(path), _REQUIRED, _OPTIONAL)
    if record["status"] == "succeeded":
        check(record, str(path), _REQUIRED_OF_SUCCEEDED)
    return record
