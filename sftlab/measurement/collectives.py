"""Counts the collectives of an optimizer step and the bytes that one process hands to them."""

from collections import defaultdict
from typing import Any

import torch
import torch.distributed
from torch.profiler import ProfilerActivity, profile

_BACKENDS = ("nccl:", "gloo:")
_BYTES = {"double": 8, "long int": 8, "float": 4, "int": 4, "c10::BFloat16": 2, "c10::Half": 2}


class Collectives:
    """Profiles one step of this process.

    After the step, `facts` holds the number of calls and the MB (2**20 bytes) of each kind. Bytes
    are the backend's input: shards for an all-gather, whole gradients for an all-reduce.
    """

    def __init__(self) -> None:
        self.facts: dict[str, dict[str, float]] | None = None
        self._profile: profile | None = None

    def begin(self) -> None:
        """Start the profiler; called when the step before has ended."""
        self._profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self._profile.start()

    def end(self) -> None:
        """Stop the profiler and count; does nothing if it was not started.

        Called when the step has ended, before its logs are written.
        """
        if self._profile is None:
            return
        self._profile.stop()
        found: dict[str, dict[str, float]] = defaultdict(lambda: {"calls": 0, "mb": 0.0})
        for event in self._profile.profiler.kineto_results.events():
            if event.name().startswith(_BACKENDS):
                kind = found[event.name().partition(":")[2].strip("_")]
                kind["calls"] += 1
                kind["mb"] += _bytes(event) / 2**20
        self.facts = {
            name: one | {"mb": round(one["mb"], 3)} for name, one in sorted(found.items())
        }
        self._profile = None


def several_processes() -> bool:
    """Returns whether the process group has more than one process."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _bytes(event: Any) -> int:
    sizes = (torch.Size(shape).numel() for shape in event.shapes() if shape)
    return sum(
        size * _BYTES.get(kind, 1) for size, kind in zip(sizes, event.dtypes(), strict=False)
    )
