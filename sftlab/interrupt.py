"""Stop on a signal at the end of a step, on all ranks at once, with one complete checkpoint."""

import os
import signal
import time
from types import FrameType

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# One Ctrl-C arrives twice: from the terminal, and from the launcher that passes it on.
ONE_PRESS_S = 2.0


class StopOnSignal(TrainerCallback):
    """TERM, USR1 and INT set a flag; the ranks agree on it at the end of a step, before the next one draws randomness.

    `received` is the signal's number once the run has stopped for it, else 0. A second Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        self._pending, self._noted = 0, 0.0
        self.received = 0
        self._group: dist.ProcessGroup | None = None
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._pending and number == signal.SIGINT and time.monotonic() - self._noted > ONE_PRESS_S:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        if not self._pending:
            self._pending, self._noted = number, time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """The ranks agree over CPU memory: a flag on the GPU would be read only once all work queued there is done."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        """Agree on the flag; save and stop if any rank was signalled."""
        number = self._pending
        if self._group is not None:
            flag = torch.tensor([number])
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
            number = int(flag)
        if number and state.global_step < state.max_steps:
            self.received = number
            control.should_save = control.should_training_stop = True
        return control
