"""Seconds of training over all starts of a run, and the note of its progress after every step."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sftlab.runs.progress import Notes


class TrainingClock(TrainerCallback):
    """Counts the seconds of training of all starts.

    Steps that were lost and done again count once. `waited_s` returns the seconds of this start
    that were spent waiting for another run, which do not count.
    """

    def __init__(self, waited_s: Callable[[], float]) -> None:
        self.earlier_s = 0.0
        self._waited_s, self._started = waited_s, time.perf_counter()
        self._notes: Notes | None = None

    def start(self) -> None:
        """Start the clock of this start."""
        self._started = time.perf_counter()

    @property
    def this_start_s(self) -> float:
        """Seconds of training since this start."""
        return time.perf_counter() - self._started - self._waited_s()

    @property
    def seconds(self) -> float:
        """Seconds of training over all starts."""
        return self.earlier_s + self.this_start_s

    def state(self) -> dict[str, Any]:
        """Returns the seconds so far."""
        return {"train_seconds": self.seconds}

    def restore(self, state: dict[str, Any]) -> None:
        """Add the seconds of the starts before this one."""
        self.earlier_s = state["train_seconds"]

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Note the step that this start continues from (rank 0)."""
        if args.process_index == 0:
            self._notes = Notes(Path(args.output_dir))
            self._notes.write(state.global_step, self.earlier_s)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Note that one more step is done (rank 0)."""
        if self._notes:
            self._notes.write(state.global_step, self.seconds)
