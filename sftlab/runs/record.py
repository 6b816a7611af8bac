"""run.json as it is read: one way for training, evaluation, report, study, app and jobs."""

import os
from pathlib import Path
from typing import Any

from sftlab.schema import (
    BOOLEAN,
    COUNT,
    NUMBER,
    OBJECT,
    OBJECTS,
    TEXT,
    Kind,
    check,
    list_of,
    one_of,
    read_object,
)

RECORD = "run.json"
STATUSES = ("running", "succeeded", "failed", "interrupted")

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
_TEXT_OR_TEXTS = Kind(
    "a text or a list of texts", lambda value: TEXT.holds(value) or list_of(TEXT).holds(value)
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
    "versions": OBJECT,
    "git_commit": TEXT.or_null(),
    "hardware": OBJECT,
    "recipe.model_name_or_path": TEXT,
    "recipe.model_revision": TEXT.or_null(),
    "recipe.dataset_name": TEXT.or_null(),
    "recipe.dataset_config": TEXT.or_null(),
    "recipe.max_length": COUNT.or_null(),
    "recipe.lora_r": COUNT.or_null(),
    "recipe.lora_target_modules": _TEXT_OR_TEXTS.or_null(),
    "recipe.load_in_4bit": BOOLEAN.or_null(),
    "recipe.load_in_8bit": BOOLEAN.or_null(),
    "recipe.dtype": TEXT.or_null(),
    "launch.precision": TEXT,
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
        f"measured.{name}": NUMBER.or_null()
        for name in (
            *("tokens_per_s", "rows_per_s", "share_of_limit", "train_loss", "train_seconds"),
            *("validation_loss", "validation_perplexity", "global_step", "step_time_s"),
        )
    },
    "measured.peak_memory": OBJECTS,
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
