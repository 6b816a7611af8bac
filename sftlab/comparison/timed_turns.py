"""How can trainings start together and still be timed one at a time?

A start takes far longer than the steps that a study times. `recipes/study.py --at_once n` starts n
trainings. Each waits before its last warm-up step until the others have come as far, or have ended.
Then they run to their ends one after the other. A waiting training computes nothing, and holds its
GPU memory. The next one starts only when the process before it is gone: beside an ending process,
steps take up to three times as long.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sftlab.child_process import Child
from sftlab.cpu_cores import cpu_cores
from sftlab.measurement.timing_turn import VARIABLE


class Command(NamedTuple):
    """The words of a command, and the file that its output goes to."""

    words: Sequence[str]
    log: Path


def in_turn(commands: Sequence[Command], timed: bool = True, **options: Any) -> Iterator[int]:
    """Start all commands, let them through one by one, and give the place of each as it ends.

    Without `timed` none waits for another.
    `options` are Popen's. When this process is told to stop, all commands are, and each may save.
    KeyboardInterrupt with the signal's number follows when they have ended.
    """
    together = len(commands) > 1
    environment = environment_beside(len(commands), timed)
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root, str(place)) for place in range(len(commands))]
        child = None
        for (words, log), folder in zip(commands, folders, strict=True):
            folder.mkdir()
            turn = {VARIABLE: f"{os.getpid()}:{folder}"} if together and timed else {}
            with log.open("w", encoding="utf-8") as output:
                given = {
                    "env": environment | turn,
                    "stdout": output,
                    "stderr": subprocess.STDOUT,
                    **options,
                }
                if child is None:
                    child = Child(words, **given)
                else:
                    child.start_beside(words, **given)
        _until(child, lambda: all(map(_is_warm, child.processes, folders)))
        for place, (folder, process) in enumerate(zip(folders, child.processes, strict=True)):
            (folder / "go").touch()
            _until(child, _has_ended, process)
            if child.asked_to_stop:
                for each in folders:
                    (each / "go").touch()
                for each in child.processes:
                    each.wait()
                raise KeyboardInterrupt(child.signal)
            yield place


def environment_beside(count: int, timed: bool) -> dict[str, str]:
    """Returns the environment of one of `count` processes that start together.

    What the user has set stays. Processes that are not timed compute beside one another: with the
    threads of all cores each, they would wait for one another most of the time.
    """
    shared = {}
    if count > 1:
        # a compiler process for every core and command would make hundreds
        shared = {"TORCHINDUCTOR_COMPILE_THREADS": "4", "OMP_WAIT_POLICY": "PASSIVE"}
    if count > 1 and not timed:
        shared["OMP_NUM_THREADS"] = str(max(1, cpu_cores() // count))
    return shared | os.environ


def _is_warm(process: subprocess.Popen, folder: Path) -> bool:
    return (folder / "warm0").exists() or _has_ended(process)


def _has_ended(process: subprocess.Popen) -> bool:
    return process.poll() is not None


def _until(child: Child, condition: Callable[..., bool], *arguments: Any) -> None:
    """Wait for a condition, or to be told to stop."""
    while not (child.asked_to_stop or condition(*arguments)):
        time.sleep(0.02)
