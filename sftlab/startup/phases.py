"""What a start of a training spends its seconds on, until its first step has ended."""

import os
import time
from pathlib import Path

import psutil

IMPORTS, CHECKS, DATA = "imports", "recipe_and_run_directory", "reading_the_data"
ENCODING, WEIGHTS, TRAINER = "encoding_the_rows", "weights", "adapter_and_trainer"
KERNELS, FIRST_CHECKS = "rest_of_the_kernels", "checks_of_the_first_step"
FIRST_STEP = "first_step"
_ended: dict[str, float] = {}


def seconds_since_start(process: int | None = None) -> float:
    """Returns the seconds since this process started, whatever was done to the clock meanwhile.

    `process` is the id of another one.
    """
    if not hasattr(time, "CLOCK_BOOTTIME"):  # no Linux
        return max(0.0, time.time() - psutil.Process(process).create_time())
    stat = Path("/proc") / str(process or "self") / "stat"
    fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # since boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def phase_ended(name: str) -> None:
    """Note that a phase has ended. The next one begins now."""
    _ended[name] = seconds_since_start()


def seconds_of_phases() -> dict[str, float]:
    """Returns the seconds of each phase that has ended, in their order."""
    ends = [0.0, *_ended.values()]
    return {name: round(ends[n + 1] - ends[n], 2) for n, name in enumerate(_ended)}
