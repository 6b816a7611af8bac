"""How far a run has come, noted after every step in a file that survives a kill.

And so what an interruption cost.
"""

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

NAME = "progress.json"
# One line of this width is written over the last one: a single write, no new block on the disk.
_WIDTH = 96


class Progress(NamedTuple):
    """Optimizer steps done, seconds of training that they took over all starts, and when that was
    noted (Unix time).
    """

    step: int
    seconds: float
    noted: float


class Notes:
    """Writes a run's progress; about two microseconds a note."""

    def __init__(self, folder: Path) -> None:
        self._file = os.open(folder / NAME, os.O_WRONLY | os.O_CREAT, 0o644)

    def write(self, step: int, seconds: float) -> None:
        """Note that `step` optimizer steps are done."""
        line = json.dumps(
            {"step": step, "train_seconds": round(seconds, 3), "noted": round(time.time(), 3)}
        )
        os.pwrite(self._file, f"{line:<{_WIDTH - 1}}\n".encode(), 0)


def read(folder: Path) -> Progress | None:
    """What was noted last; None where nothing can be read, as after a power loss."""
    try:
        noted = json.loads((folder / NAME).read_text(encoding="utf-8"))
        return Progress(noted["step"], noted["train_seconds"], noted["noted"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def cost(reached: Progress | None, step: int, seconds: float, now: float) -> dict[str, Any]:
    """What it costs to go on from a checkpoint of `step` steps and `seconds` of training.

    None where it is not known.

    `stopped_seconds` is how long nothing ran, from the last sign of life until now.
    """
    if reached is None:
        return {"steps_done_again": None, "seconds_done_again": None, "stopped_seconds": None}
    again = max(0, reached.step - step)
    return {
        "steps_done_again": again,
        "seconds_done_again": round(max(0.0, reached.seconds - seconds), 2) if again else 0.0,
        "stopped_seconds": round(max(0.0, now - reached.noted), 1),
    }
