"""Stops a training whose loss, gradients or weights are no longer finite.

Every step notes on the device whether its loss and its gradient norm are finite; nothing waits for
the device. The note is read when a log is due, and before every checkpoint. A step that fp16's loss
scaler skips does not count.
"""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from sftlab.measurement.hardware_limit import synchronize

# steps between two looks where logs are further apart, or there are none
LONGEST_INTERVAL = 100
# skipped steps in a row after which no loss scale is left that could help
MOST_SKIPPED = 40
_NEVER = 2**62
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class NotFinite(RuntimeError):
    """The training diverged; the message says what is not finite, and in which step."""


class Finiteness(TrainerCallback):
    """Looks for values that are not finite, and raises NotFinite on every rank at once."""

    def __init__(self, trainer: SFTTrainer) -> None:
        self._trainer = trainer
        self._loss: torch.Tensor | None = None
        self._norm: torch.Tensor | None = None
        self._first: torch.Tensor | None = None  # first step whose loss, norm was not finite, [2]
        self._skipped = 0

    def add_loss(self, loss: torch.Tensor) -> None:
        """Add the loss of a micro-batch."""
        loss = loss.detach().float()
        self._loss = loss if self._loss is None else self._loss + loss

    def set_norm(self, norm: torch.Tensor | float) -> None:
        """Take the norm of the gradients of the step."""
        if hasattr(norm, "full_tensor"):  # sharded
            norm = norm.full_tensor()
        self._norm = torch.as_tensor(norm, device=self._trainer.args.device).detach().float()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Note whether the step was finite; look where a log is due."""
        loss, norm, self._loss, self._norm = self._loss, self._norm, None, None
        if self._trainer.accelerator.optimizer_step_was_skipped:
            self._skipped += 1
            if self._skipped >= MOST_SKIPPED:
                raise NotFinite(
                    f"diverged: the last {self._skipped} steps up to step {state.global_step} were "
                    "skipped, for their gradients are not finite at any loss scale of fp16"
                )
            return
        self._skipped = 0
        if loss is not None and norm is not None:
            bad = ~torch.isfinite(torch.stack([loss.reshape(()), norm.reshape(())]))
            if self._first is None:
                self._first = torch.full((2,), _NEVER, device=bad.device)
            self._first = self._first.where(~bad, self._first.clamp(max=state.global_step))
        by_steps = args.logging_strategy == "steps"
        interval = int(args.logging_steps) if by_steps and args.logging_steps >= 1 else _NEVER
        due = control.should_log or state.global_step % min(interval, LONGEST_INTERVAL) == 0
        if due or control.should_save or control.should_evaluate:
            self.look()

    def look(self) -> None:
        """Raise NotFinite if a step so far, or a weight, was not finite. Every rank calls it."""
        trainer = self._trainer
        groups = trainer.optimizer.param_groups
        weights = are_finite(p for group in groups for p in group["params"])
        device = trainer.accelerator.device
        first = self._first if self._first is not None else torch.full((2,), _NEVER)
        weight = _NEVER - (~weights).long().reshape(1)
        found = torch.cat([first.to(device), weight.to(device)])
        loss, norm, other = _least_of_all_ranks(trainer.accelerator, found)
        step = min(loss, norm)
        if step < _NEVER:
            what = "loss" if loss <= norm else "gradient norm"
            raise NotFinite(f"diverged: the {what} of step {step} is not finite")
        if other < _NEVER:
            step = trainer.state.global_step
            raise NotFinite(f"diverged: a weight is not finite after step {step}")

    def look_at_optimizer(self) -> None:
        """Raise NotFinite if a state of the optimizer is not finite. Every rank calls it."""
        trainer = self._trainer
        synchronize()  # the host reads what is paged
        states = (one for state in trainer.optimizer.state.values() for one in _tensors(state))
        bad = (~are_finite(states)).long().reshape(1)
        (found,) = _least_of_all_ranks(trainer.accelerator, -bad)
        if found:
            step = trainer.state.global_step
            raise NotFinite(f"diverged: a state of the optimizer is not finite after step {step}")


def are_finite(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Returns whether every value of the tensors is finite, as a scalar on their device."""
    local = [one.to_local() if hasattr(one, "to_local") else one for one in tensors]
    local = [one.detach() for one in local if one.dtype in _FLOATS and one.numel()]
    by_kind: dict[tuple, list[torch.Tensor]] = {}
    for one in local:
        by_kind.setdefault((one.device, one.dtype), []).append(one)
    largest = [
        torch.stack(torch._foreach_norm(same, float("inf"))).float().max()
        for same in by_kind.values()
    ]
    if not largest:
        return torch.tensor(True)
    device = next((one.device for one in largest if one.device.type != "cpu"), largest[0].device)
    return torch.isfinite(torch.stack([one.to(device) for one in largest])).all()


def _tensors(state: Any) -> Iterable[torch.Tensor]:
    values = state.values() if isinstance(state, dict) else ()
    return (value for value in values if isinstance(value, torch.Tensor))


def _least_of_all_ranks(accelerator: Accelerator, numbers: torch.Tensor) -> list[int]:
    """Returns the smallest of each number over all ranks, [n]. Waits for the device."""
    numbers = numbers.to(accelerator.device)
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MIN)
    return numbers.tolist()
