"""A decoder layer's MLP with fused LoRA as one function, from its input to down's output.

Its activation is written where down's product reads it, and its gradient where the products of gate
and up read theirs. The activation is not kept for the backward: its gradient works it out again.
"""

from functools import cache

import torch
from torch import nn

from sftlab.fastpath.lora_products import LoraProduct, adapter_gradients
from sftlab.fastpath.mlp_ops import gated_backward, gated_down
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
        layers = self.gate_proj, self.up_proj, self.down_proj
        both, down = self.gate_proj.together, self.down_proj.together
        rows = x.reshape(-1, self.gate_proj.in_features).to(both.joined.dtype)
        scales = [layer.scale for layer in layers]
        matrices = [matrix for layer in layers for matrix in layer.matrices]
        found = _Mlp.apply(rows, both.joined, down.joined, self.tanh_gelu, scales, *matrices)
        return found.unflatten(0, x.shape[:-1])

    def _is_ready(self, x: torch.Tensor) -> bool:
        layers = self.gate_proj, self.up_proj, self.down_proj
        if not all(isinstance(layer, LoraProduct) for layer in layers):  # peft merged and left
            return False
        if not self.gate_proj.together.is_ready(x) or not self.down_proj.together.is_ready(x):
            return False
        if any(layer.training and layer.dropped for layer in layers):
            return False
        for module in (*layers, self.act_fn):
            if module._forward_hooks or module._forward_pre_hooks:
                return False
            if module._backward_hooks or module._backward_pre_hooks:
                return False
        return True


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
    if gate.base_layer.weight.dtype != down.base_layer.weight.dtype:
        return
    if not gate.out_features == up.out_features == down.in_features:
        return
    if (tanh_gelu := tanh_gelu_of(module)) is not None:
        module.__class__ = _with_lora(type(module))
        module.tanh_gelu = tanh_gelu


def unfuse_mlp(module: LoraMlp) -> None:
    """Give an MLP its own class back, in place."""
    module.__class__ = own_class(module)
    del module.tanh_gelu


def own_class(module: LoraMlp) -> type[nn.Module]:
    """Returns the class that an MLP had before it was fused."""
    return type(module).__bases__[1]


@cache
def _with_lora(of: type[nn.Module]) -> type[nn.Module]:
    """Returns a class that is LoraMlp first and then `of`, the same one for every layer."""
    return type(f"Lora{of.__name__}", (LoraMlp, of), {"__module__": __name__})


class _Mlp(torch.autograd.Function):
    """down's [act, h] [W, s B]^T of act = f(gate) up: [rows, in] to [rows, out].

    `joined` and `down` hold W, A and s B as in SharedInput, of gate and up and of down; `matrices`
    are A and B of gate, up and down, whose gradients it returns.
    """

    @staticmethod
    def forward(
        ctx: object,
        x: torch.Tensor,
        joined: torch.Tensor,
        down: torch.Tensor,
        tanh_gelu: bool,
        scales: list[float],
        *matrices: torch.Tensor,
    ) -> torch.Tensor:
        width = x.shape[1]
        wide = len(joined) - joined.shape[1] + width
        both = torch.cat([x, x.new_zeros(len(x), joined.shape[1] - width)], 1)
        both[:, width:] = both @ joined[wide:].t()
        y = both @ joined[:wide].t()
        found, h = gated_down(y, down, tanh_gelu)
        ctx.save_for_backward(both, y, h, joined, down)
        ctx.tanh_gelu, ctx.scales, ctx.dtype = tanh_gelu, scales, matrices[0].dtype
        ctx.rank, ctx.rank_down = len(matrices[0]), len(matrices[4])
        return found

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple:
        both, y, h, joined, down = ctx.saved_tensors
        size, out = y.shape[1] // 2, gradient.shape[1]
        into_b_down = gradient.t() @ h
        into_x, into_a, into_b, into_a_down = gated_backward(
            gradient, y, both, joined, down, ctx.tanh_gelu
        )
        dtype, (*scales, scale) = ctx.dtype, ctx.scales
        found = adapter_gradients(into_a, into_b, ctx.rank, [size, size], scales, dtype)
        found += adapter_gradients(into_a_down, into_b_down, ctx.rank_down, [out], [scale], dtype)
        return into_x, None, None, None, None, *found
