"""A child process that ends by itself, whatever signals arrive meanwhile."""

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from typing import Any


class Child:
    """Runs a command. `asked_to_stop` is true once this process got a signal to stop, `signal` it.

    The child ends in its own way; a training saves a checkpoint. A signal is passed on only where
    it came to this process alone: USR1, and TERM outside Slurm, which sends TERM to every process
    of a job. A terminal sends Ctrl-C to both. It is passed on as TERM to every process started
    here, or by `pass_on`. The signal handlers stay in place afterwards.
    """

    def __init__(
        self, command: Sequence[str], pass_on: Callable[[], Any] | None = None, **options: Any
    ) -> None:
        self.asked_to_stop, self.signal = False, 0
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
        """Run one more command, unless this process was asked to stop."""
        if not self.asked_to_stop:
            self.processes.append(subprocess.Popen(command, **options))

    def _hear(self, number: int, frame: object) -> None:
        self.asked_to_stop, self.signal = True, self.signal or number
        if number in self._alone and self.processes:
            self._pass_on()

    def wait(self) -> int:
        """Wait for the first command. Returns its exit status."""
        return self.processes[0].wait()
