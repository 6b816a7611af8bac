"""What stands in for CUDA graphs on a CPU: a tape of the operations that a step was made of.

A replay runs the operations again on the very tensors of the recording, and Python's values in
between are those of the recording, as in a graph. What would wait for the device is an error.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(word in str(function) for word in WAITS):
            raise RuntimeError(f"operation not permitted when recording: {function}")
        outputs = function(*args, **(kwargs or {}))
        given = {
            one.untyped_storage().data_ptr()
            for one in tree_leaves((args, kwargs))
            if isinstance(one, torch.Tensor)
        }
        made = [
            one
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in given
            else None
            for one in tree_leaves(outputs)
        ]
        self.calls.append((function, args, kwargs or {}, made))
        return outputs


def _not_permitted(*_: object) -> None:
    raise RuntimeError("operation not permitted when recording: the state of random numbers")


class Tape:
    """Records work on a CPU; `recorded` counts it."""

    recorded = replayed = forgotten = 0
    short = False

    def warm(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        return work()

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        type(self).recorded += 1
        with (
            mock.patch.object(torch, "get_rng_state", _not_permitted),
            mock.patch.object(torch, "set_rng_state", _not_permitted),
            _Recording() as recording,
        ):
            result = work()
        with torch.no_grad():  # a graph's tensors hold nothing until it is replayed
            result.fill_(float("nan"))

        @torch.no_grad()
        def replay() -> None:
            type(self).replayed += 1
            for function, args, kwargs, made in recording.calls:
                again = tree_leaves(function(*args, **kwargs))
                for old, new in zip(made, again, strict=True):
                    if old is not None:
                        old.copy_(new)

        return replay, result

    def short_of_memory(self) -> bool:
        return self.short

    def forget(self, drop: Callable[[], object]) -> None:
        type(self).forgotten += 1
        drop()

    def on_its_stream(self) -> AbstractContextManager[None]:
        return nullcontext()
