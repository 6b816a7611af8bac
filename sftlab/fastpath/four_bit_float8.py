"""A frozen 4-bit linear whose two products run in float8.

Its weight stays stored in 4 bits. Each product has it given back in float8, by one kernel and in
the order that it reads: W for the outputs, W^T for the gradient of the input. Inputs and gradients
are rounded as float8.py does it, with a scale for each token. Nothing of it is kept for the
backward but the 4 bits.
"""

import torch
from bitsandbytes import nn as bitsandbytes
from torch import nn

from sftlab.fastpath import four_bit_linear
from sftlab.fastpath.float8 import BACKWARD, FORWARD, float8_product, to_float8
from sftlab.fastpath.four_bit_float8_weight import float8_scale, four_bit_float8, plainly
from sftlab.fastpath.four_bit_linear import scales_of, stored_as

# weights a block, nf4 or fp4, rows and columns of the weight
How = tuple[int, str, int, int]

# how far outputs and gradients may be from those in 16 bits, of their norm: e5m2 has two digits,
# and rounds numbers by 5 % on average
TOLERANCE = 0.08


class Float8Linear4bit(bitsandbytes.Linear4bit):
    """bitsandbytes' 4-bit linear whose products run in float8 while the model trains.

    That is also so without a gradient, as in the forward of a reference: it is rounded as the
    model that trains is. In an evaluation, and for an answer's tokens, it is bitsandbytes' own
    forward. Parameters, their names and what is saved are bitsandbytes'. `scale` is the weight's in
    float8, for every column of either product, and `how` says how it is stored.
    """

    scale: torch.Tensor
    how: How

    @property
    def rounds_inputs(self) -> bool:
        """Whether it multiplies in float8."""
        return self.training

    def stored(self) -> tuple[torch.Tensor | None, ...]:
        """Returns its weight in 4 bits, what its scales are, and the scale in float8."""
        return self.weight, *scales_of(self.weight), self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x W^T: [..., in] to [..., out], in x's dtype."""
        if not self.rounds_inputs or x.numel() == 0:
            return super().forward(x)
        return self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x W^T by products in float8."""
        asked = x.dtype
        y = _Product.apply(x.reshape(-1, self.in_features), *self.stored(), self.how)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if asked == y.dtype else y.to(asked)


class _Product(torch.autograd.Function):
    """x W^T of a weight that is in float8 only while it is multiplied; only x has a gradient."""

    @staticmethod
    def forward(
        ctx: object,
        x: torch.Tensor,
        packed: torch.Tensor,
        scales: torch.Tensor,
        code: torch.Tensor | None,
        larger: torch.Tensor | None,
        offset: torch.Tensor | None,
        scale: torch.Tensor,
        how: How,
    ) -> torch.Tensor:
        ctx.save_for_backward(packed, scales, code, larger, offset, scale)
        ctx.how, ctx.dtype = how, x.dtype
        weight = four_bit_float8(packed, scales, code, larger, offset, *how, scale, False)
        return float8_product(*to_float8(x, FORWARD, by_row=True), weight, scale)

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple:
        *weight, scale = ctx.saved_tensors
        weight_t = four_bit_float8(*weight, *ctx.how, scale, True, gradient)
        into_x = float8_product(*to_float8(gradient, BACKWARD, by_row=True), weight_t, scale)
        return into_x.to(ctx.dtype), *[None] * 7


def why_not(layer: nn.Module, dtype: torch.dtype) -> str | None:
    """Returns why a 4-bit linear cannot multiply in float8; None if it can.

    `dtype` is that of the products' outputs.
    """
    if reason := four_bit_linear.not_understood(layer, dtype):
        return reason
    if layer.in_features % 16 or layer.out_features % 16:
        return "their sizes are no multiples of 16"
    return None


def take(layer: nn.Module) -> None:
    """Let a linear, of which `why_not` knows no reason, multiply in float8 while it trains."""
    weight = layer.weight
    scales, *nested = scales_of(weight)
    nested = None if nested[0] is None else nested
    scale = float8_scale(scales, nested, weight.quant_state.quant_type)
    layer.__class__ = Float8Linear4bit
    layer.how = tuple(stored_as(weight.quant_state)[:4])
    layer.scale = scale.repeat(1, max(layer.in_features, layer.out_features))


@torch.no_grad()
def weight_differs(layer: Float8Linear4bit) -> str | None:
    """Returns how many weights differ from those that plain torch rounds; None where none does.

    The weight is whole in float32 meanwhile.
    """
    *of, scale = layer.stored()
    packed, scales, *nested = of
    block, kind, *shape = layer.how
    code = None if nested[0] is None else nested
    for transposed in (False, True):
        right = plainly(packed, scales, code, block, kind, shape, scale, transposed)
        found = four_bit_float8(*of, *layer.how, scale, transposed)
        apart = (found.bfloat16() != right.bfloat16()).sum().item()  # which is exact
        if apart:
            return f"{apart:,} of {found.numel():,} weights in float8 are not plain torch's"
    return None


def product_differs(layer: Float8Linear4bit) -> str | None:
    """Returns how far outputs or gradients are from those in 16 bits; None where they are near."""
    products = layer.product, super(Float8Linear4bit, layer).forward
    for name, far in four_bit_linear.distances(layer, *products).items():
        if not far <= TOLERANCE:
            return f"in float8 {name} are {far:.1%} from those in 16 bits"
    return None
