"""Processes that average their gradients record steps of their own, and end that together.

One that can record no more goes on with plain micro-batches, and says so beside its gradients. All
of them read that a step later, when nobody has to wait for it. They go back to plain steps in front
of the same micro-batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sftlab.fastpath.captured_step import NotCaptured, StaticGradients

Result = TypeVar("Result")


class SharedCapture:
    """What the processes know of one another; `problem` is why this one records no more."""

    def __init__(self) -> None:
        self.problem: str | None = None
        self._last: _Note | None = None
        self._ends = False

    def go_on(self) -> None:
        """Raise NotCaptured in all processes once one has had a problem, in front of one step."""
        if self._ends:
            raise NotCaptured(first_problem(self.problem))

    def average(self, gradients: StaticGradients) -> None:
        """Average the gradients at the end of a step, and learn how the last one ended."""
        told = _Note(gradients.average(float(self.problem is not None)))
        if self._last is not None:
            self._ends = self._ends or self._last.read() > 0
        self._last = told


class _Note:
    """A number on the device that is read later; reading it waits for nothing that came after."""

    def __init__(self, number: torch.Tensor) -> None:
        on_gpu = number.is_cuda
        self._number = torch.empty(1, dtype=number.dtype, pin_memory=on_gpu)
        self._number.copy_(number, non_blocking=True)
        self._copied = torch.cuda.Event() if on_gpu else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._number)


def together(work: Callable[[], Result]) -> Result:
    """Returns what `work` returns; where it raises NotCaptured in one process, all raise it.

    Every process calls it at once, and waits for the others.
    """
    result, problem = None, None
    try:
        result = work()
    except NotCaptured as error:
        problem = str(error)
    problem = first_problem(problem)
    if problem is not None:
        raise NotCaptured(problem)
    return result


def first_problem(problem: str | None) -> str | None:
    """Returns the problem of the first process that has one; every process gives its own, or None.

    With several processes it names the process.
    """
    found = gather_object([problem])
    if len(found) == 1:
        return problem
    return next((f"process {rank}: {one}" for rank, one in enumerate(found) if one), None)


def averages_now(model: nn.Module) -> bool:
    """Returns whether a backward of the model would average gradients over several processes."""
    return isinstance(model, DistributedDataParallel) and model.require_backward_grad_sync


@contextmanager
def averaging(model: nn.Module) -> Iterator[None]:
    """Inside, a backward of a model under DDP averages the gradients, also amid a step."""
    if not isinstance(model, DistributedDataParallel):
        yield
        return
    before, model.require_backward_grad_sync = model.require_backward_grad_sync, True
    try:
        yield
    finally:
        model.require_backward_grad_sync = before


def without_ddp(model: nn.Module) -> nn.Module:
    """Returns the model inside DDP, whose backward averages nothing; any other as it is."""
    return model.module if isinstance(model, DistributedDataParallel) else model
