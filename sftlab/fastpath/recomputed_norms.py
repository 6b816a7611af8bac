"""Norms of a compiled layer whose outputs are computed again in the backward instead of kept.

Products keep a norm's output for the gradients of what reads it. It is cheap to compute again from
the norm's input, which is kept for the norm's own gradient.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sftlab.fastpath.own_class import with_forward


class RecomputedNorm(nn.Module):
    """What a norm is computed by, beside its own class: the same values, which are not kept.

    torch.compile sees a checkpoint around it, and so does not keep what is within. Where nothing is
    compiled, the norm is as its own class has it.
    """

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        """Returns what the norm's own class does, of a tensor of any shape."""
        if not torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        again = {"use_reentrant": False, "preserve_rng_state": False}
        return checkpoint(super().forward, *args, **again, **kwargs)


def recompute_norms(layer: nn.Module) -> None:
    """Let the norms of a decoder layer be computed again in the backward, in place.

    Norms of heads, within the attention, stay: their outputs are not kept anyway.
    """
    for module in layer.children():
        if type(module).__name__.endswith("Norm"):
            module.__class__ = with_forward(RecomputedNorm, type(module))
