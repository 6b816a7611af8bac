"""Base and tuned of full fine-tuning: one model, whose weights change places with the base's."""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

# the base's weights of each tuned model, while they wait for their turn
_OTHER: WeakKeyDictionary[nn.Module, dict[str, torch.Tensor]] = WeakKeyDictionary()


def hold_base(tuned: nn.Module, base: nn.Module) -> None:
    """Keep the weights of `base` for `as_base(tuned)`. They stay where they are.

    Raises ValueError where the two models differ in names or shapes of weights.
    """
    weights = {name: parameter.data for name, parameter in base.named_parameters()}
    own = {name: parameter.shape for name, parameter in tuned.named_parameters()}
    held = {name: weight.shape for name, weight in weights.items()}
    if own != held:
        other = sorted(own.items() ^ held.items())[0][0]
        raise ValueError(f"base and tuned are not of one shape: {other} differs")
    _OTHER[tuned] = weights


@contextmanager
def as_base(tuned: nn.Module) -> Iterator[None]:
    """Let a model that `hold_base` was called for compute with the base's weights."""
    _exchange(tuned)
    try:
        yield
    finally:
        _exchange(tuned)


@torch.no_grad()
def _exchange(tuned: nn.Module) -> None:
    held = _OTHER[tuned]
    for name, parameter in tuned.named_parameters():
        waiting = held[name]
        if waiting.device == parameter.device:
            held[name], parameter.data = parameter.data, waiting
        else:  # the GPU has no room for both
            held[name] = parameter.data.to(waiting.device, copy=True)
            parameter.data.copy_(waiting)
