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


class Stopped(BaseException):
    """The training was told to stop. No library takes it for an error of its own and goes on."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


class StopOnSignal(TrainerCallback):
    """TERM, USR1 and INT set a flag.

    The ranks agree on it at the end of a step, before the next one draws randomness.

    Once the checkpoint of that step is saved, `Stopped` is raised on all of them. Before the first
    step there is none to save: one process raises it at once, several once all are ready to begin,
    for the others would miss one that left. After the last step a signal changes nothing. A second
    Ctrl-C raises it at once, a third one ends the process. `agreed` is the signal's number once the
    ranks save and stop for it, else 0.
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
        """The ranks agree over CPU memory:

        a flag on the GPU would be read only once all work queued there is done.
        """
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
        """Agree on the flag; save and stop if any rank was signalled."""
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
        """The checkpoint of the last step is there."""
        if self.agreed:
            raise Stopped(self.agreed)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """What is left is saving the adapter."""
        self._training, self._trained = False, True
