"""A run's progress, written after every step to a file that survives a kill."""

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from sftlab.schema import COUNT, DURATION, NUMBER, check, read_object

NAME = "progress.json"
# Each line overwrites the last one with a single write, so the file never grows.
_WIDTH = 96


class Progress(NamedTuple):
    """Optimizer steps done, their training seconds over all starts, and the time (Unix)."""

    step: int
    seconds: float
    noted: float


class Notes:
    """Writes a run's progress, in about two microseconds per step."""

    def __init__(self, folder: Path) -> None:
        self._file = os.open(folder / NAME, os.O_WRONLY | os.O_CREAT, 0o644)

    def write(self, step: int, seconds: float) -> None:
        """Write that `step` optimizer steps are done."""
        line = json.dumps(
            {"step": step, "train_seconds": round(seconds, 3), "noted": round(time.time(), 3)}
        )
        os.pwrite(self._file, f"{line:<{_WIDTH - 1}}\n".encode(), 0)


def read(folder: Path) -> Progress | None:
    """Returns the last progress, or None where there is none.

    Raises ValueError for a file that cannot be read, as after a power loss or an edit by hand.
    """
    path = folder / NAME
    if not os.path.lexists(path):
        return None
    noted = read_object(path)
    check(noted, str(path), {"step": COUNT, "train_seconds": DURATION, "noted": NUMBER})
    return Progress(noted["step"], noted["train_seconds"], noted["noted"])


def cost(reached: Progress | None, step: int, seconds: float, now: float) -> dict[str, Any]:
    """Returns what it costs to continue from a checkpoint at `step` with `seconds` of training.

    `stopped_seconds` is the time from the last written step until `now`. Values are None where
    progress is not known.
    """
    if reached is None:
        return {"steps_done_again": None, "seconds_done_again": None, "stopped_seconds": None}
    again = max(0, reached.step - step)
    return {
        "steps_done_again": again,
        "seconds_done_again": round(max(0.0, reached.seconds - seconds), 2) if again else 0.0,
        "stopped_seconds": round(max(0.0, now - reached.noted), 1),
    }
