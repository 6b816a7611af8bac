"""Stops a training on a signal: on all ranks, at the end of a step, with a complete checkpoint."""

import os
import signal
import time
from types import FrameType

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# One Ctrl-C arrives twice: from the terminal, and from the launcher, which passes it on.
ONE_PRESS_S = 2.0


class Stopped(BaseException):
    """The training was told to stop; no Exception, so that no library catches it and goes on."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


class StopOnSignal(TrainerCallback):
    """Stops all ranks after SIGTERM, SIGUSR1 or SIGINT, and raises `Stopped` on each of them.

    | signal arrives        | what happens                                                       |
    | --------------------- | ------------------------------------------------------------------ |
    | before the first step | a single process stops at once; several when all are ready to begin |
    | within a step         | the step ends, its checkpoint is saved, then all ranks stop         |
    | after the last step   | nothing: what is left is saving the adapter                         |

    A second Ctrl-C stops at once, a third one ends the process. `agreed` is the number of the
    signal that the ranks save and stop for, else 0.
    """

    def __init__(self) -> None:
        self._pending, self.agreed, self._noted = 0, 0, 0.0
        self._training = self._trained = False
        self._alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
        self._group: dist.ProcessGroup | None = None
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._pending:
            if number == signal.SIGINT and time.monotonic() - self._noted > ONE_PRESS_S:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                raise Stopped(number)
            return
        self._pending, self._noted = number, time.monotonic()
        if self._alone and not self._training and not self._trained:
            raise Stopped(number)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Make a group for agreeing over CPU memory; a GPU flag would wait for all queued work."""
        self._training = True
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")
            if number := self._of_any_rank():
                raise Stopped(number)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> TrainerControl:
        """Agree with the other ranks; save and stop if any of them was signalled."""
        number = self._of_any_rank()
        if number and state.global_step < state.max_steps:
            self.agreed = number
            control.should_save = control.should_training_stop = True
        return control

    def _of_any_rank(self) -> int:
        if self._group is None:
            return self._pending
        flag = torch.tensor([self._pending])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return int(flag)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Stop, now that the checkpoint is saved."""
        if self.agreed:
            raise Stopped(self.agreed)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Ignore signals from here on: what is left is saving the adapter."""
        self._training, self._trained = False, True
