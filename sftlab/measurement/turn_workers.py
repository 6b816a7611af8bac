"""Worker processes that take turns: how long each is waited for, why one failed, how one ends.

A worker reports by files in its folder (turnstile.py).
"""

import math
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil

from sftlab.tables import preview

# Seconds of a turn after which a worker hangs.
TURN_S = 120.0
# the process of the command, which workers outlive where it is killed
_COMMAND = "SFTLAB_TURNS_OF"


@dataclass
class Limits:
    """When is a worker late? Times are those of time.monotonic()."""

    patience: float
    end: float = math.inf
    began: float = field(default_factory=time.monotonic)

    def passed(self) -> float:
        """Returns the seconds since the command began."""
        return time.monotonic() - self.began

    def until(self, seconds: float) -> float:
        """Returns the time in so many seconds, or the end of the command where that is sooner."""
        return min(time.monotonic() + seconds, self.end)

    def over(self) -> bool:
        """Returns whether the command's time is up."""
        return time.monotonic() >= self.end


class Worker(NamedTuple):
    """A process that trains a variant, with the folder in which it reports."""

    folder: Path
    process: subprocess.Popen
    started: float


def take_turn(worker: Worker, turn: int, limits: Limits) -> str | None:
    """Let a worker train a turn. Returns why it did not, None where it did."""
    until = limits.until(TURN_S)
    why = awaited(worker, f"ready{turn}", until, limits)
    if why is None:
        (worker.folder / f"go{turn}").touch()
        why = awaited(worker, f"done{turn}", until, limits)
    return why


def awaited(worker: Worker, file: str, until: float, limits: Limits) -> str | None:
    """Wait until a worker has written a file. Returns why it has not, None where it has."""
    while not (worker.folder / file).exists():
        if worker.process.poll() is not None and not (worker.folder / file).exists():
            return reason(log_of(worker))
        if time.monotonic() >= until:
            what = "ready" if file.startswith("ready") else "done"
            waited = f"not {what} {time.monotonic() - worker.started:.0f} s after its start"
            return f"the time was up: {waited}" if limits.over() else waited
        time.sleep(0.02)
    return None


def told_its_command() -> dict[str, str]:
    """Returns the environment of a worker that ends when this process does."""
    return os.environ | {_COMMAND: str(os.getpid())}


def wait_for_turn_file(path: Path) -> None:
    """Wait in a worker until its command has made a file. Exits where the command has ended."""
    command = os.environ.get(_COMMAND)
    while not path.exists():
        if command and not _runs(int(command)):
            sys.exit("error: the command that started this worker has ended")
        time.sleep(0.01)


def _runs(process: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    return False


def log_of(worker: Worker) -> str:
    """Returns what a worker has printed."""
    return (worker.folder / "log").read_text(encoding="utf-8", errors="replace")


def reason(log: str) -> str:
    """Returns the line of a log that says why its process failed."""
    lines = [line.strip() for line in log.splitlines() if line.strip("=- \t")]
    errors = [
        line
        for line in lines
        if re.match(r"(error:|[\w.]*(Error|Exception|Exit|Interrupt)\b|[\w.]+\.[A-Z]\w+: )", line)
        and not re.search("CalledProcessError|ChildFailedError", line)  # the launcher's, on it
    ]
    return preview((errors or lines or ["it ended without a word"])[-1], 200)


def end(worker: Worker) -> None:
    """End a worker and all that it started, so that the GPU's memory is free."""
    try:
        launcher = psutil.Process(worker.process.pid)
        mine = [launcher, *launcher.children(recursive=True)]
    except psutil.NoSuchProcess:
        mine = []
    for process in mine:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(mine, timeout=10)
    worker.process.wait()
