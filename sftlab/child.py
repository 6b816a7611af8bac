"""A child process that is waited for to its own end, whatever signals arrive meanwhile."""

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from typing import Any


class Child:
    """Runs a command; `asked_to_stop` once this process was told to stop. The handlers stay afterwards.

    The child ends in its own way (a training saves a checkpoint), so a signal is only passed on where it came to this
    process alone: USR1, and TERM outside Slurm, which sends TERM to every process of a job. Ctrl-C a terminal gives to
    both. It is passed on as TERM, or as `pass_on` does it.
    """

    def __init__(self, command: Sequence[str], pass_on: Callable[[], Any] | None = None, **options: Any) -> None:
        self.asked_to_stop, self.process = False, None
        self._pass_on = pass_on or (lambda: self.process.terminate())
        self._alone = {signal.SIGUSR1} | (set() if "SLURM_JOB_ID" in os.environ else {signal.SIGTERM})
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._hear)
        self.process = subprocess.Popen(command, **options)
        if self.asked_to_stop:
            self._pass_on()

    def _hear(self, number: int, frame: object) -> None:
        self.asked_to_stop = True
        if number in self._alone and self.process is not None:
            self._pass_on()

    def wait(self) -> int:
        """Its exit status."""
        return self.process.wait()
