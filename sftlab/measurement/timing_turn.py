"""Runs of a timed study warm up together and are timed one at a time: waiting for the turn."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

# Holds "PID:FOLDER": the process that gives the turns, and the folder where this run signals.
VARIABLE = "SFTLAB_TURN"


def wait_for_turn(give_back: Callable[[], Any] | None = None) -> float:
    """Report that this process is warm, and wait for its turn.

    Returns the seconds waited; 0.0 outside a timed study. `give_back` is called before the wait, to
    free memory that the process holds but does not use.
    """
    if VARIABLE not in os.environ:
        return 0.0
    giver, folder = os.environ[VARIABLE].split(":", 1)
    began = time.perf_counter()
    if give_back:
        give_back()
    Path(folder, f"warm{os.environ.get('RANK', 0)}").touch()
    while not Path(folder, "go").exists() and psutil.pid_exists(int(giver)):
        time.sleep(0.01)
    return time.perf_counter() - began
