"""A child process that is waited for to its own end, whatever signals arrive meanwhile."""

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from typing import Any


class Child:
    """Runs a command; `asked_to_stop` once this process was told to stop.

    The handlers stay afterwards.

    The child ends in its own way (a training saves a checkpoint), so a signal is only passed on
    where it came to this process alone: USR1, and TERM outside Slurm, which sends TERM to every
    process of a job. Ctrl-C a terminal gives to both. It is passed on as TERM to every process that
    was started here, or as `pass_on` does it.
    """

    def __init__(
        self, command: Sequence[str], pass_on: Callable[[], Any] | None = None, **options: Any
    ) -> None:
        self.asked_to_stop = False
        self.processes: list[subprocess.Popen] = []
        self._pass_on = pass_on or (lambda: [process.terminate() for process in self.processes])
        self._alone = {signal.SIGUSR1} | (
            set() if "SLURM_JOB_ID" in os.environ else {signal.SIGTERM}
        )
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._hear)
        self.processes.append(subprocess.Popen(command, **options))
        if self.asked_to_stop:
            self._pass_on()

    def start_beside(self, command: Sequence[str], **options: Any) -> None:
        """Run one more command, unless this process has been told to stop."""
        if not self.asked_to_stop:
            self.processes.append(subprocess.Popen(command, **options))

    def _hear(self, number: int, frame: object) -> None:
        self.asked_to_stop = True
        if number in self._alone and self.processes:
            self._pass_on()

    def wait(self) -> int:
        """Exit status of the first."""
        return self.processes[0].wait()
