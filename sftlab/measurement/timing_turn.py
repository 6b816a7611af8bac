"""A training that is one of several waits until it may be timed."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

# Process that gives the turns, and a folder of this training's.
VARIABLE = "SFTLAB_TURN"


def wait_for_turn(give_back: Callable[[], Any] | None = None) -> float:
    """Say that this process is warm, and wait until it is let through; the seconds.

    None without a study around it.

    `give_back` is called before a wait: for memory that this process keeps and does not use.
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
