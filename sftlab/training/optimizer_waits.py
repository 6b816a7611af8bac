"""bitsandbytes' optimizers wait for the GPU where the host reads their state, and nowhere else.

Version: bitsandbytes 0.50.2, optim/optimizer.py, `Optimizer8bit.step`. It calls `sync_gpu` after
each tensor's update, and a paged optimizer once more at the end. So the GPU has nothing to do while
Python starts the next update, and again while Python prepares the next step. Everything on the GPU
runs in the order of one stream; only a paged state lies where the host can read it too early.

A paged optimizer also asks for each tensor's state to be brought to the GPU. The driver does that
on the host between two kernels, and has to even where the state never left: it leaves when memory
is short. Delete when it waits as this does, and asks where something left.
"""

import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.optim import Optimizer

# states of a paged optimizer stay on a GPU that has at least this share of its memory free
FREE = 0.05


def wait_to_read(optimizer: Optimizer) -> bool:
    """Let an optimizer of bitsandbytes wait for the GPU before its state is read, in place.

    What it computes, its state and what is saved of it stay as they are: the GPU does the same work
    in the same order. Who reads `optimizer.state` without `state_dict` must wait first. Returns
    whether it is one; others, and those with a step of their own, are left alone.
    """
    own = type(optimizer)
    if not any(one.__module__.startswith("bitsandbytes.") for one in own.__mro__):
        return False
    from bitsandbytes.optim.optimizer import Optimizer8bit

    if inspect.unwrap(own.step) is not inspect.unwrap(Optimizer8bit.step):
        return False
    if "step" in vars(optimizer):  # a schedule has wrapped the class's step already
        return False
    optimizer.__class__ = _that_waits_to_read(own)
    return True


@cache
def _that_waits_to_read(of: type[Optimizer]) -> type[Optimizer]:
    """Returns `of` with another step; hooks and profilers see the step as they see that of `of`."""
    step = Optimizer.profile_hook_step(_step)
    step.hooked = True

    def state_dict(self: Any) -> dict[str, Any]:
        _wait(self)
        return of.state_dict(self)

    own = {"__module__": __name__, "step": step, "state_dict": state_dict}
    return type(of.__name__, (of,), own)


@torch.no_grad()
def _step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
    """Take a step as `Optimizer8bit.step` does, but for the waiting; returns the closure's loss."""
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    if not self.initialized:
        self.check_overrides()
        self.to_gpu()
        self.initialized = True
    may_be_away = self.is_paged and memory_is_short()
    for group_index, group in enumerate(self.param_groups):
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            if len(self.state[parameter]) == 0:
                self.init_state(group, parameter, group_index, index)
            if may_be_away:
                self.prefetch_state(parameter)
            self.update_step(group, parameter, group_index, index)
    if self.is_paged and sys.platform != "linux":  # no host may touch pages while a GPU works
        _wait(self)
    return loss


def _wait(optimizer: Any) -> None:
    from bitsandbytes.utils import sync_gpu

    first = next(one for group in optimizer.param_groups for one in group["params"])
    sync_gpu(first)


def memory_is_short() -> bool:
    """Whether the GPU is so full that its driver may have moved paged states to the host.

    A kernel that needs them there still gets them, page by page. On a CPU nothing is paged.
    """
    if not torch.cuda.is_available():
        return False
    free, of = torch.cuda.mem_get_info()
    return free < FREE * of
