"""Fused LoRA on frozen linears in 4 bits: LoRA's matrices are written beside the weights.

A 4-bit weight is whole only while it is multiplied. Its kernel writes it into a matrix that has
room for LoRA's, so the product of both costs one small copy more.
"""

from collections.abc import Mapping

import torch
from peft.tuners import lora
from peft.tuners.lora.bnb import Linear4bit
from torch import nn

from sftlab.fastpath import four_bit_float8, four_bit_linear
from sftlab.fastpath.lora_products import SharedInput, Views


class FourBitInput(SharedInput):
    """Layers with 4-bit weights that read one tensor, without dropout.

    `held` are s B with zeros below it, [out + ranks, ranks], and A with zeros behind it, [ranks, in
    + ranks]. It is ready where a gradient is kept. Without one bitsandbytes has products of its
    own, for an answer's tokens.
    """

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its products."""
        return self.layers[0].base_layer.compute_dtype

    @property
    def rounding(self) -> tuple[int | None, str]:
        """How its weights were rounded: weights a block and the kind of 4 bits."""
        state = self.layers[0].base_layer.weight.quant_state
        return state.blocksize, state.quant_type

    def tensors(self) -> list[torch.Tensor]:
        """Returns s B, A, and the tensors of every weight."""
        found = list(self.held)
        for layer in self.layers:
            weight = layer.base_layer.weight
            found += [
                weight,
                *(one for one in four_bit_linear.scales_of(weight) if one is not None),
            ]
        return found

    def is_ready(self, x: torch.Tensor) -> bool:
        """Whether a gradient is kept, and its layers are ready for x."""
        return torch.is_grad_enabled() and super().is_ready(x)

    def forget(self, weights: Mapping[nn.Parameter, torch.Tensor]) -> None:
        """Be as before the decoder's first forward."""
        self.held, self._x, self._waiting = None, None, []

    def hold_weights(self) -> None:
        """Make room for the copies of LoRA's matrices, unless there is."""
        first = self.layers[0]
        device = first.base_layer.weight.device
        if not self.holds_these_ranks() or self.held[0].device != device:
            out, ranks = sum(self.form.sizes), self.columns()
            b = torch.zeros(out + ranks, ranks, dtype=self.dtype, device=device)
            self.hold(b, b.new_zeros(ranks, first.in_features + ranks))

    def find_views(self) -> Views:
        """Returns where each layer's tensors are in what is held."""
        b, a = self.held
        width, out = self.layers[0].in_features, sum(self.form.sizes)
        return Views(self.held, *self.parts(a[:, :width], b[:out]), [])


def why_not(layer: lora.LoraLayer, dtype: torch.dtype) -> str | None:
    """Returns why LoRA cannot be fused with a frozen linear in 4 bits; None if it can.

    `dtype` is that of the products.
    """
    base = layer.get_base_layer()
    if isinstance(base, four_bit_float8.Float8Linear4bit):
        return "the products of the weights are in float8"
    if not isinstance(base, four_bit_linear.Linear4bit):
        return f"{type(base).__name__} has bitsandbytes' own products"
    if type(layer) is not Linear4bit:
        return f"{type(base).__name__} under peft's {type(layer).__name__} is unknown"
    if (was := base.weight.quant_state.dtype) != dtype:
        return f"the weights were {was} before they had 4 bits, and the products are {dtype}"
    if base.in_features % 8:
        return "the size of their input is no multiple of 8"
    if any(isinstance(one, nn.Dropout) for one in layer.lora_dropout.values()):
        # a forward without gradients is peft's, as reentrant checkpointing's first one: other masks
        return "in 4 bits LoRA with dropout stays peft's"
    return None
