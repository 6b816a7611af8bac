"""Peak memory of a run, and the memory of one step by part.

Parameters, gradients and optimizer state are the bytes of the tensors: under FSDP, a rank's shards.
Activations are what the first micro-batch's forward leaves for its backward. `peak` is the most
that the step held. Both come from the allocator; on a CPU, from the profiler's memory events.
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
# The second step is measured: the optimizer has its state, and the warm-up is not yet over.
_STEP = 1


class MemorySplit(TrainerCallback):
    """Measures one step; afterwards `facts` holds the GB (2**30 bytes) of each part."""

    def __init__(self) -> None:
        self.facts: dict[str, float] = {}
        self.peak_before = 0
        self._first: int | None = None
        self._parts: dict[str, int] = {}
        self._profile: profile | None = None
        # bytes that a rehearsal's forward left, and the most that it held; beyond those before it
        self._rehearsed: dict[str, int] = {}
        self._rehearses = False

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        """Start measuring if this is the step to measure."""
        self._first = state.global_step if self._first is None else self._first
        if state.global_step != self._first + _STEP:
            return
        self._parts = {"parameters": _bytes([*model.parameters(), *_kept_beside(model)])}
        if torch.cuda.is_available():
            self._begin_peak()
        else:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.start()

    def _begin_peak(self) -> None:
        self.peak_before = max(self.peak_before, torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        self._began = torch.cuda.memory_allocated()

    def rehearse(self, work: Callable[[], Any]) -> Any:
        """Returns what a forward and backward returns that stands for those replayed later.

        The allocator does not see what a replay of a CUDA graph holds.
        """
        if not torch.cuda.is_available():
            return work()
        self._begin_peak()
        self._rehearses = True
        try:
            return work()
        finally:
            self._rehearses = False
            self._rehearsed["peak"] = torch.cuda.max_memory_allocated() - self._began

    def replayed(self) -> None:
        """Note a replay; the step's first one counts."""
        if self._parts and self._rehearsed and "activations" not in self._parts:
            self._parts["activations"] = self._rehearsed["activations"]
            self._parts["peak"] = self._began + self._rehearsed["peak"]

    def forward_ended(self) -> None:
        """Note the activations; called after every forward, the step's first one counts."""
        if self._rehearses:
            self._rehearsed["activations"] = torch.cuda.memory_allocated() - self._began
            return
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
        """Note the gradients, which are complete now."""
        if self._parts:
            self._parts["gradients"] = _bytes(
                p.grad for p in model.parameters() if p.grad is not None
            )

    def on_step_end(
        self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any
    ) -> None:
        """Note the optimizer state and the peak, and stop measuring."""
        if not self._parts:
            return
        states = (value for one in optimizer.state.values() for value in one.values())
        self._parts["optimizer_state"] = _bytes(
            value for value in states if isinstance(value, torch.Tensor)
        )
        if self._profile is None:
            peak = torch.cuda.max_memory_allocated()
            self._parts["peak"] = max(peak, self._parts.get("peak", 0))
        else:
            self._profile.stop()
            held = self._parts["parameters"] + self._parts["optimizer_state"]
            self._parts["activations"], above = _from_record(self._profile)
            self._parts["peak"], self._profile = held + above, None
        self.facts = {f"{part}_gb": round(size / 2**30, 6) for part, size in self._parts.items()}
        self._parts = {}


def peak_beyond(work: Callable[[], Any]) -> int:
    """Returns the most bytes that `work` held beyond those held before it."""
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
    """Returns tensors that weights need beside parameters, such as the scales of 4-bit blocks."""
    scales = [state for m in model.modules() if (state := vars(m).get("quant_state")) is not None]
    scales += [state.state2 for state in scales if state.state2 is not None]
    values = (value for thing in [*model.modules(), *scales] for value in vars(thing).values())
    return [value for value in values if isinstance(value, torch.Tensor)]


def _bytes(tensors: Any) -> int:
    local = (t.to_local() if hasattr(t, "to_local") else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in local)


def _from_record(record: profile) -> tuple[int, int]:
    """Returns the bytes held when the first forward ended, and the most held, beyond the start."""
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


class PeakMemory:
    """Peak memory of this process over all starts of the run, with one step's memory by part.

    `split` measures the parts; None where they are not measured.
    """

    def __init__(self, split: MemorySplit | None = None) -> None:
        self._split = split
        self._earlier: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """Returns the peak of this process in GB (2**30 bytes), over all starts so far.

        On a GPU the allocated and the reserved memory, on a CPU the resident set.
        """
        before, parts = (self._split.peak_before, self._split.facts) if self._split else (0, {})
        if torch.cuda.is_available():
            mine = {
                "allocated_gb": round(max(before, torch.cuda.max_memory_allocated()) / 2**30, 3),
                "reserved_gb": round(torch.cuda.max_memory_reserved() / 2**30, 3),
            }
        else:
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            mine = {"resident_gb": round(resident / 2**20, 3)}
        mine = {name: max(peak, self._earlier.get(name, 0.0)) for name, peak in mine.items()}
        parts = parts or self._earlier.get("step", {})
        return mine | ({"step": parts} if parts else {})

    def restore(self, state: dict[str, Any]) -> None:
        """Take the peaks of the starts before this one into account."""
        self._earlier = state

    def of_all_ranks(self) -> list[dict[str, Any]]:
        """Returns `state()` of every rank, for run.json. Every process calls it."""
        return gather_object([self.state()])
