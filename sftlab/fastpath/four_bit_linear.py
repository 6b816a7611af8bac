"""A frozen 4-bit linear whose two products each have the whole weight given back by one kernel.

bitsandbytes gives it back by several kernels, each started through Python, in the forward and again
in the backward. Results are bitsandbytes' to the last bit where it multiplies whole weights, so for
the tokens of a training's micro-batch. For few tokens it has a product of its own: a few hundred at
most on an H200, depending on the weight's size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from bitsandbytes import nn as bitsandbytes
from bitsandbytes.functional import QuantState, dequantize_4bit
from torch import nn
from torch.nn.functional import linear

from sftlab.fastpath.four_bit_weight import four_bit_weight
from sftlab.fastpath.mlp_ops import has_kernels

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# from so many tokens on bitsandbytes always multiplies whole weights
WHOLE_FROM = 2048


class Linear4bit(bitsandbytes.Linear4bit):
    """bitsandbytes' 4-bit linear with a product of its own where a gradient passes it.

    Elsewhere it is bitsandbytes' own forward: in an evaluation, and for an answer's tokens.
    Parameters, their names and what is saved are bitsandbytes'. So is its own name: run.json says
    of both that the same linears ran.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x W^T: [..., in] to [..., out], in x's dtype."""
        if not self._is_ready(x):
            return super().forward(x)
        weight, asked = self.weight, x.dtype
        state = weight.quant_state
        if asked != self.compute_dtype:
            x = x.to(self.compute_dtype)
        y = _Product.apply(x, weight, *scales_of(weight), stored_as(state))
        return y if asked == y.dtype else y.to(asked)

    def _is_ready(self, x: torch.Tensor) -> bool:
        if not torch.is_grad_enabled() or not x.requires_grad or not has_kernels(x):
            return False
        return getattr(self.weight, "quant_state", None) is not None and x.numel() > 0


class Stored(NamedTuple):
    """How a weight is stored: weights a block, nf4 or fp4, its shape and dtype before."""

    block: int
    kind: str
    rows: int
    columns: int
    dtype: torch.dtype


def scales_of(weight: bitsandbytes.Params4bit) -> tuple[torch.Tensor | None, ...]:
    """Returns scales, and of nested ones what they stand for, the larger scales and the offset."""
    state = weight.quant_state
    nested = state.state2
    code, larger = (None, None) if nested is None else (nested.code, nested.absmax)
    return state.absmax, code, larger, state.offset


def stored_as(state: QuantState) -> Stored:
    """Returns how a weight with this state is stored."""
    return Stored(state.blocksize, state.quant_type, *state.shape, state.dtype)


class _Product(torch.autograd.Function):
    """x W^T of a weight that is whole only while it is multiplied; only x has a gradient."""

    @staticmethod
    def forward(
        ctx: object,
        x: torch.Tensor,
        packed: torch.Tensor,
        scales: torch.Tensor,
        code: torch.Tensor | None,
        larger: torch.Tensor | None,
        offset: torch.Tensor | None,
        stored: Stored,
    ) -> torch.Tensor:
        ctx.save_for_backward(packed, scales, code, larger, offset)
        ctx.stored = stored
        return linear(
            x, four_bit_weight(packed, scales, code, larger, offset, *stored[:4], x.dtype)
        )

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple:
        # as bitsandbytes does, in the dtype in which the weight was rounded to 4 bits
        weight = four_bit_weight(*ctx.saved_tensors, *ctx.stored, gradient)
        if weight.dtype != gradient.dtype:
            weight = weight.to(gradient.dtype)
        return gradient @ weight, None, None, None, None, None, None


def why_not(layer: nn.Module, dtype: torch.dtype) -> str | None:
    """Returns why a 4-bit linear keeps bitsandbytes' forward; None if it need not.

    `dtype` is that of the products.
    """
    if not has_kernels(layer.weight):
        return f"the weights are on the {layer.weight.device.type}"
    return not_understood(layer, dtype)


def not_understood(layer: nn.Module, dtype: torch.dtype) -> str | None:
    """Returns what this project does not know of a 4-bit linear, on any device; None if nothing."""
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    if type(layer) is not bitsandbytes.Linear4bit or "forward" in vars(layer):
        return f"{type(layer).__name__} has a forward of its own"
    if layer.bias is not None:
        return f"{type(layer).__name__} has a bias"
    if type(weight) is not bitsandbytes.Params4bit or state is None or weight.requires_grad:
        return "the weights are no frozen ones with scales beside them"
    if layer.compute_dtype != dtype:
        return f"they compute in {layer.compute_dtype}, and the products in {dtype}"
    shape = layer.out_features, layer.in_features
    if getattr(state, "packing_format_for_cpu", False) or tuple(state.shape) != shape:
        return "the weights are stored in another order"
    if state.quant_type not in ("nf4", "fp4") or state.blocksize not in BLOCKS:
        return f"{state.quant_type} in blocks of {state.blocksize} is unknown"
    nested = state.state2
    tensors = [state.absmax] if nested is None else [nested.absmax, nested.code, state.offset]
    if {one.dtype for one in tensors} != {torch.float32} or state.dtype not in DTYPES:
        return "the scales are not in float32"
    if nested is not None and (nested.blocksize != 256 or state.absmax.dtype != torch.uint8):
        return "the scales are rounded in another way"
    if not all(one.is_contiguous() for one in (weight, state.absmax, *tensors)):
        return "the weights or their scales have gaps in memory"
    if state.shape.numel() % 8 or weight.nbytes * 2 != state.shape.numel():
        return "the number of weights is no multiple of 8"
    return None


def take(layer: nn.Module) -> None:
    """Give a linear, of which `why_not` knows no reason, the product."""
    layer.__class__ = Linear4bit


@torch.no_grad()
def weight_differs(layer: Linear4bit) -> str | None:
    """Returns how many of a layer's weights are not bitsandbytes'; None where all are.

    Its weight is whole twice meanwhile.
    """
    state = layer.weight.quant_state
    right = dequantize_4bit(layer.weight, state)
    found = four_bit_weight(layer.weight, *scales_of(layer.weight), *stored_as(state))
    if torch.equal(found, right):
        return None
    apart = (found != right).sum().item()
    return f"{apart:,} of {found.numel():,} weights are not bitsandbytes'"


def product_differs(layer: Linear4bit) -> str | None:
    """Returns how far outputs or gradients are from bitsandbytes'; None where they are equal."""
    for name, far in distances(layer, layer.forward, super(Linear4bit, layer).forward).items():
        if far:
            return f"{name} are {far:.1e} from bitsandbytes'"
    return None


def distances(
    layer: bitsandbytes.Linear4bit, found: Callable[..., object], right: Callable[..., object]
) -> dict[str, float]:
    """Returns how far outputs and gradients of a product are from another's, of their norm."""
    device, dtype = layer.weight.device, layer.compute_dtype
    generator = torch.Generator(device).manual_seed(0)
    x, gradient = (
        torch.randn(WHOLE_FROM, size, device=device, dtype=dtype, generator=generator)
        for size in (layer.in_features, layer.out_features)
    )
    pairs = []
    for forward in (found, right):
        mine = x.clone().requires_grad_()
        with torch.enable_grad():
            y = forward(mine)
        pairs.append((y.detach(), *torch.autograd.grad(y, mine, gradient)))
    return {
        name: 0.0
        if torch.equal(one, other)
        else ((one - other).float().norm() / other.float().norm()).item()
        for name, one, other in zip(("outputs", "gradients"), *pairs, strict=True)
    }
