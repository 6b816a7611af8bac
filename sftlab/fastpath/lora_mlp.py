"""A decoder layer's MLP with fused LoRA as one function, from its input to down's output.

Its activation is written where down's product reads it, and its gradient where the products of gate
and up read theirs. The activation is not kept for the backward: its gradient works it out again.
"""

import torch
from torch import nn

from sftlab.fastpath.float8_lora_mlp import Float8LoraMlp
from sftlab.fastpath.joined_product import Form, adapter_gradients, for_gradients, for_outputs
from sftlab.fastpath.lora_products import LoraProduct
from sftlab.fastpath.mlp_ops import gated_backward, gated_down, kernels_with_lora
from sftlab.fastpath.own_class import is_watched, own_class, with_forward
from sftlab.models.gated_mlp import NAMES, tanh_gelu_of


class LoraMlp(nn.Module):
    """What down(f(gate(x)) up(x)) is computed by, beside the model's own class for an MLP.

    It falls back to that class's forward where one of the three does to peft's (see LoraProduct),
    and under dropout, and where a hook looks at what is within.
    """

    tanh_gelu: bool

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """Returns the MLP's output: [..., hidden] to [..., hidden]."""
        if args or kwargs or not self._is_ready(x):
            return super().forward(x, *args, **kwargs)
        both, down = self.gate_proj.together, self.down_proj.together
        rows = x.reshape(-1, self.gate_proj.in_features).to(both.dtype)
        matrices = [matrix for layer in self._linears for matrix in layer.matrices]
        held = both.tensors()
        found = (Float8LoraMlp if both.in_float8 else _Mlp).apply(
            rows, self.tanh_gelu, both.form, down.form, len(held),
            *held, *down.tensors(), *matrices,
        )  # fmt: skip
        return found.unflatten(0, x.shape[:-1])

    @property
    def kernels_have_lora(self) -> bool:
        """Whether its kernels have LoRA's thin products in them while it trains."""
        both, down = self.gate_proj.together, self.down_proj.together
        if any(layer.dropped for layer in self._linears):
            return False
        place = self.gate_proj.base_layer.weight.device
        act = torch.empty(1, self.gate_proj.out_features, dtype=both.dtype, device=place)
        return all(kernels_with_lora(act, one.layers[0].rank) for one in (both, down))

    @property
    def _linears(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.gate_proj, self.up_proj, self.down_proj

    def _is_ready(self, x: torch.Tensor) -> bool:
        layers = self._linears
        if not all(isinstance(layer, LoraProduct) for layer in layers):  # peft merged and left
            return False
        if not self.gate_proj.together.is_ready(x) or not self.down_proj.together.is_ready(x):
            return False
        if any(layer.training and layer.dropped for layer in layers):
            return False
        return not any(is_watched(module) for module in (*layers, self.act_fn))


def fuse_mlp(module: nn.Module) -> None:
    """Let an MLP whose layers are LoraProducts compute as one, in place, if it is understood."""
    layers = [getattr(module, name, None) for name in NAMES]
    if not all(isinstance(one, LoraProduct) and "forward" not in vars(one) for one in layers):
        return
    gate, up, down = layers
    if gate.together.layers != (gate, up) or down.together.layers != (down,):
        return
    if any(layer.base_layer.bias is not None for layer in layers):
        return
    if gate.together.dtype != down.together.dtype:
        return
    if gate.together.in_float8 != down.together.in_float8:
        return
    if not gate.out_features == up.out_features == down.in_features:
        return
    if (tanh_gelu := tanh_gelu_of(module)) is not None:
        module.__class__ = with_forward(LoraMlp, type(module))
        module.tanh_gelu = tanh_gelu


def unfuse_mlp(module: LoraMlp) -> None:
    """Give an MLP its own class back, in place."""
    module.__class__ = own_class(module)
    del module.tanh_gelu


class _Mlp(torch.autograd.Function):
    """down's [act, h] [W, s B]^T of act = f(gate) up: [rows, in] to [rows, out].

    `form` and the first `count` of `tensors` are those of gate and up, as for_outputs takes them.
    `form_down` and the next tensors are down's. The last six are A and B of gate, up and down,
    whose gradients it returns.
    """

    @staticmethod
    def forward(
        ctx: object,
        x: torch.Tensor,
        tanh_gelu: bool,
        form: Form,
        form_down: Form,
        count: int,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        held, held_down, matrices = tensors[:count], tensors[count:-6], tensors[-6:]
        wide, a = for_outputs(form, held)
        width = x.shape[1]
        both = torch.cat([x, x.new_zeros(len(x), len(a))], 1)
        both[:, width:] = h = both @ a.t()
        y = both @ wide.t()
        wide_down, a_down = for_outputs(form_down, held_down)
        ctx.rank, ctx.rank_down, ctx.dtype = len(matrices[0]), len(matrices[4]), matrices[0].dtype
        a_down = a_down[:, : y.shape[1] // 2]
        found, h_down = gated_down(y, wide_down, a_down, ctx.rank_down, tanh_gelu)
        ctx.save_for_backward(x, h, y, h_down, *held, *held_down)
        ctx.tanh_gelu, ctx.form, ctx.form_down, ctx.count = tanh_gelu, form, form_down, count
        return found

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple:
        x, h, y, h_down, *held = ctx.saved_tensors
        tall, b = for_gradients(ctx.form, held[: ctx.count], gradient)
        tall_down, b_down = for_gradients(ctx.form_down, held[ctx.count :], gradient)
        into_b_down = gradient.t() @ h_down
        into_x, into_a, into_b, into_a_down = gated_backward(
            gradient, y, x, h, tall, b[: y.shape[1]], tall_down, b_down[: gradient.shape[1]],
            ctx.rank, ctx.rank_down, ctx.tanh_gelu,
        )  # fmt: skip
        found = adapter_gradients(into_a, into_b, ctx.rank, ctx.form, ctx.dtype)
        found += adapter_gradients(
            into_a_down, into_b_down, ctx.rank_down, ctx.form_down, ctx.dtype
        )
        return into_x, None, None, None, None, *(None for _ in held), *found
