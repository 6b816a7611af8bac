"""Collectives of an optimizer step:

how often processes talk to each other, and how much one of them hands over.
"""

from collections import defaultdict
from typing import Any

import torch
import torch.distributed
from torch.profiler import ProfilerActivity, profile

_BACKENDS = ("nccl:", "gloo:")
_BYTES = {"double": 8, "long int": 8, "float": 4, "int": 4, "c10::BFloat16": 2, "c10::Half": 2}


class Collectives:
    """Watches one step of this process.

    `facts` has calls and MB (2**20 bytes) by kind once it is over.

    What is counted is what the backend was given: shards for an all-gather, whole gradients for an
    all-reduce.
    """

    def __init__(self) -> None:
        self.facts: dict[str, dict[str, float]] | None = None
        self._profile: profile | None = None

    def begin(self) -> None:
        """The step before is over."""
        self._profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self._profile.start()

    def end(self) -> None:
        """The step is over, its batches read and its logs not yet written.

        Nothing where none had begun.
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
    """Whether this process has others to talk to."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _bytes(event: Any) -> int:
    sizes = (torch.Size(shape).numel() for shape in event.shapes() if shape)
    return sum(
        size * _BYTES.get(kind, 1) for size, kind in zip(sizes, event.dtypes(), strict=False)
    )
