"""What fills the memory in a step: parameters, gradients, optimizer state, activations, and work
beyond them.

Parameters, gradients and optimizer state are the tensors' own bytes, a rank's shards under FSDP.
Activations are what the first micro-batch's forward leaves behind for its backward, and `peak` the
most that was held in the step: both read from the allocator, on a CPU from the profiler's record of
it.
"""

import resource
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback

_FORWARD_ENDED = "sftlab: the forward ended"
# The second step of a start is measured: the optimizer has its state then, and the warm-up is not
# yet over.
_STEP = 1


class MemorySplit(TrainerCallback):
    """Measures one step; `facts` has GB (2**30 bytes) by part once it is over."""

    def __init__(self) -> None:
        self.facts: dict[str, float] = {}
        self.peak_before = 0
        self._first: int | None = None
        self._parts: dict[str, int] = {}
        self._profile: profile | None = None

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        """Begin to watch."""
        self._first = state.global_step if self._first is None else self._first
        if state.global_step != self._first + _STEP:
            return
        self._parts = {"parameters": _bytes([*model.parameters(), *_kept_beside(model)])}
        if torch.cuda.is_available():
            self.peak_before = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self._began = torch.cuda.memory_allocated()
        else:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.start()

    def forward_ended(self) -> None:
        """Called after the forward of every micro-batch; the first of the step counts."""
        if not self._parts or "activations" in self._parts:
            return
        if self._profile is None:
            self._parts["activations"] = torch.cuda.memory_allocated() - self._began
        else:
            self._parts["activations"] = 0
            with record_function(_FORWARD_ENDED):
                pass

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        """Gradients are complete."""
        if self._parts:
            self._parts["gradients"] = _bytes(
                p.grad for p in model.parameters() if p.grad is not None
            )

    def on_step_end(
        self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any
    ) -> None:
        """Read what was seen."""
        if not self._parts:
            return
        states = (value for one in optimizer.state.values() for value in one.values())
        self._parts["optimizer_state"] = _bytes(
            value for value in states if isinstance(value, torch.Tensor)
        )
        if self._profile is None:
            self._parts["peak"] = torch.cuda.max_memory_allocated()
        else:
            self._profile.stop()
            held = self._parts["parameters"] + self._parts["optimizer_state"]
            self._parts["activations"], above = _from_record(self._profile)
            self._parts["peak"], self._profile = held + above, None
        self.facts = {f"{part}_gb": round(size / 2**30, 6) for part, size in self._parts.items()}
        self._parts = {}


def peak_beyond(work: Callable[[], Any]) -> int:
    """The most bytes that `work` held beyond what was held before it.

    From the allocator, on a CPU its record.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    return _most(_changes(record))


def _kept_beside(model: nn.Module) -> list[torch.Tensor]:
    """What weights need that is no parameter:

    float8 ones a second time, scales of the blocks of 4-bit ones.
    """
    scales = [state for m in model.modules() if (state := vars(m).get("quant_state")) is not None]
    scales += [state.state2 for state in scales if state.state2 is not None]
    values = (value for thing in [*model.modules(), *scales] for value in vars(thing).values())
    return [value for value in values if isinstance(value, torch.Tensor)]


def _bytes(tensors: Any) -> int:
    local = (t.to_local() if hasattr(t, "to_local") else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in local)


def _from_record(record: profile) -> tuple[int, int]:
    """Bytes held beyond the beginning when the first forward ended, and the most that were held
    beyond it.
    """
    events, changes = record.profiler.kineto_results.events(), _changes(record)
    ended = min(event.start_ns() for event in events if event.name() == _FORWARD_ENDED)
    return sum(change for time, change in changes if time <= ended), _most(changes)


def _changes(record: profile) -> list[tuple[int, int]]:
    events = record.profiler.kineto_results.events()
    return sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )


def _most(changes: Sequence[tuple[int, int]]) -> int:
    return max(accumulate((change for _, change in changes), initial=0))


def peak_memory(
    split: MemorySplit | None = None, earlier: dict[str, Any] | None = None
) -> list[dict[str, float]]:
    """`peak_of_process` of every rank; every process calls it."""
    return gather_object([peak_of_process(split, earlier)])


def peak_of_process(
    split: MemorySplit | None = None, earlier: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Peak memory in GB (2**30 bytes): GPU allocated and reserved, or the process's resident set.

    With `split`, a step's memory by part as well. With `earlier`, what an earlier start of the run
    had, the larger one.
    """
    before, parts = (split.peak_before, split.facts) if split else (0, {})
    earlier = earlier or {}
    if torch.cuda.is_available():
        mine = {
            "allocated_gb": round(max(before, torch.cuda.max_memory_allocated()) / 2**30, 3),
            "reserved_gb": round(torch.cuda.max_memory_reserved() / 2**30, 3),
        }
    else:
        mine = {"resident_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)}
    mine = {name: max(peak, earlier.get(name, 0.0)) for name, peak in mine.items()}
    parts = parts or earlier.get("step", {})
    return mine | ({"step": parts} if parts else {})
