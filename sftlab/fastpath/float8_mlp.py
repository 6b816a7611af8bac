"""A decoder layer's MLP over float8 weights as one function, with or without LoRA.

Its activation and the gradients of gate and up are rounded by the kernel that makes them. The
activation is not kept for the backward: its gradient works it out again. LoRA is computed in
bfloat16 of what was not rounded. Weights stored in 4 bits are in float8 while they are multiplied.
"""

from collections.abc import Sequence

import torch
from peft.tuners import lora
from torch import nn

from sftlab.fastpath import one_adapter
from sftlab.fastpath.float8 import (
    BACKWARD,
    FORWARD,
    FrozenFloat8Linear,
    float8_product,
    multiplies_in_float8,
    to_float8,
)
from sftlab.fastpath.float8_mlp_ops import (
    LARGEST_SIZE,
    add_product_,
    gated_backward_to_float8_,
    gated_to_float8,
)
from sftlab.fastpath.four_bit_float8_weight import four_bit_float8
from sftlab.fastpath.own_class import is_watched, with_forward
from sftlab.models.gated_mlp import NAMES, tanh_gelu_of

# tensors of a weight in 4 bits
IN_FOUR_BITS = 6


class Float8Mlp(nn.Module):
    """What down(f(gate(x)) up(x)) is computed by, beside the model's own class for an MLP.

    Disabled adapters are left out. It falls back to that class's forward while adapters are merged
    or under dropout, where LoRA is not computed in bfloat16, where a hook looks at what is within,
    and over weights in 4 bits while the model does not train.
    """

    tanh_gelu: bool

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """Returns the MLP's output: [..., hidden] to [..., hidden]."""
        if args or kwargs or not self._is_ready(x):
            return super().forward(x, *args, **kwargs)
        layers = self.gate_proj, self.up_proj, self.down_proj
        hows = tuple(getattr(_base(layer), "how", None) for layer in layers)
        frozen = [tensor for layer in layers for tensor in _base(layer).stored()]
        adapted = [layer for layer in layers if _has_lora(layer)]
        scales = tuple(one_adapter.scale(one) if _has_lora(one) else None for one in layers)
        matrices = [matrix for layer in adapted for matrix in one_adapter.matrices(layer)]
        rows = x.reshape(-1, x.shape[-1])
        found = _Mlp.apply(rows, self.tanh_gelu, scales, hows, *frozen, *matrices)
        return found.unflatten(0, x.shape[:-1])

    def _is_ready(self, x: torch.Tensor) -> bool:
        layers = self.gate_proj, self.up_proj, self.down_proj
        bases = [_base(layer) for layer in layers]
        if any(is_watched(module) for module in (*layers, *bases, self.act_fn)):
            return False
        return all(_computes_as_here(layer, x.device.type) for layer in layers)


def fuse_float8_mlps(model: nn.Module) -> int:
    """Let every MLP over float8 linears that is understood compute as one function, in place.

    Parameters, their names and what peft saves stay as they are. Returns how many do.
    """
    fused = 0
    for module in list(model.modules()):
        layers = [getattr(module, name, None) for name in NAMES]
        if not all(_is_understood(layer) for layer in layers):
            continue
        gate, up, down = (_base(layer) for layer in layers)
        sizes = {gate.out_features, up.out_features, down.in_features}
        if len(sizes) > 1 or max(sizes) > LARGEST_SIZE or gate.in_features != up.in_features:
            continue
        if (tanh_gelu := tanh_gelu_of(module)) is not None:
            module.__class__ = with_forward(Float8Mlp, type(module))
            module.tanh_gelu = tanh_gelu
            fused += 1
    return fused


def _is_understood(layer: nn.Module | None) -> bool:
    linear = layer.base_layer if isinstance(layer, lora.LoraLayer) else layer
    if not (multiplies_in_float8(linear) and linear.bias is None):
        return False
    if linear is layer:
        return True
    if type(layer) is not _class_of_lora(linear) or layer.fan_in_fan_out:
        return False
    return not one_adapter.why_not_plain(layer)


def _class_of_lora(linear: nn.Module) -> type[nn.Module]:
    if isinstance(linear, FrozenFloat8Linear):
        return lora.Linear
    from peft.tuners.lora.bnb import Linear4bit

    return Linear4bit


def _computes_as_here(layer: nn.Module, device: str) -> bool:
    if not getattr(_base(layer), "rounds_inputs", False):  # or peft merged and left
        return False
    if not _has_lora(layer):
        return True
    if not one_adapter.adapts(layer) or (layer.training and one_adapter.dropped(layer)):
        return False
    return one_adapter.product_dtype(layer, device) == torch.bfloat16


def _has_lora(layer: nn.Module) -> bool:
    return isinstance(layer, lora.LoraLayer) and not layer.disable_adapters


def _base(layer: nn.Module) -> nn.Module:
    return layer.base_layer if isinstance(layer, lora.LoraLayer) else layer


class _Mlp(torch.autograd.Function):
    """down's act W^T + s (act A^T) B^T of act = f(gate) up: [rows, in] to [rows, out].

    `tensors` are what `stored` returns of gate, up and down, and then A and B of those whose place
    in `scales` has LoRA's s. `hows` say how weights in 4 bits are stored, None of whole ones. It
    returns the gradients of A and B.
    """

    @staticmethod
    def forward(
        ctx: object,
        x: torch.Tensor,
        tanh_gelu: bool,
        scales: tuple[float | None, float | None, float | None],
        hows: tuple[tuple | None, tuple | None, tuple | None],
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        frozen, matrices = _split(tensors, [3 if how is None else IN_FOUR_BITS for how in hows])
        adapters = _adapters(scales, matrices)
        rounded, x16 = to_float8(x, FORWARD, by_row=True), x.to(torch.bfloat16)
        hs = _project(x16, adapters[:2])
        gate, up = (
            _add(float8_product(*rounded, *_weight(frozen[i], hows[i])), hs[i], adapters[i])
            for i in range(2)
        )
        act8, act_scale, act = gated_to_float8(gate, up, tanh_gelu, scales[2] is not None)
        hs += _project(act, adapters[2:])
        kept = [h for h in hs if h is not None]
        if scales[:2] != (None, None):
            kept.append(x16)
        pairs = zip(frozen, hows, strict=True)
        read = [one for of, how in pairs for one in (of[1:] if how is None else of)]
        ctx.save_for_backward(gate, up, *read, *matrices, *kept)
        ctx.tanh_gelu, ctx.scales, ctx.hows, ctx.dtype = tanh_gelu, scales, hows, x.dtype
        y = float8_product(act8, act_scale, *_weight(frozen[2], hows[2]))
        return _add(y, hs[2], adapters[2])

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple:
        gate, up, *saved = ctx.saved_tensors
        hows = ctx.hows
        frozen, saved = _split(saved, [2 if how is None else IN_FOUR_BITS for how in hows])
        adapters = _adapters(ctx.scales, saved)
        rest = iter(saved[2 * sum(one is not None for one in adapters) :])
        hs = [None if one is None else next(rest) for one in adapters]
        x = next(rest, None)
        into_y = [gradient.to(torch.bfloat16)]
        rounded = to_float8(gradient, BACKWARD, by_row=True)
        into_h_down = _into_h(into_y, adapters[2:])
        act = _add_through_a(
            float8_product(*rounded, *_weight_t(frozen[2], hows[2], gradient)),
            into_h_down,
            adapters[2:],
        )  # its gradient; then act itself, in its place
        *rounded, into_gate, into_up = gated_backward_to_float8_(
            act, gate, up, ctx.tanh_gelu, x is not None, into_h_down is not None
        )
        into_ys = [into_gate, into_up]
        into_h = _into_h(into_ys, adapters[:2])
        into_x = float8_product(*rounded[:2], *_weight_t(frozen[0], hows[0], rounded[0]))
        into_x = _add_through_a(into_x, into_h, adapters[:2])
        weight_t = _weight_t(frozen[1], hows[1], rounded[2])
        into_x = into_x + float8_product(*rounded[2:], *weight_t)
        found = _into_adapters(x, into_h, into_ys, hs[:2], adapters[:2])
        found += _into_adapters(act, into_h_down, into_y, hs[2:], adapters[2:])
        given = sum(3 if how is None else IN_FOUR_BITS for how in hows)
        return into_x.to(ctx.dtype), None, None, None, *[None] * given, *found


def _split(
    tensors: Sequence[torch.Tensor | None], sizes: Sequence[int]
) -> tuple[list[Sequence[torch.Tensor | None]], Sequence[torch.Tensor]]:
    """Returns so many tensors of each of three weights, and the others."""
    found = []
    for size in sizes:
        found.append(tensors[:size])
        tensors = tensors[size:]
    return found, tensors


def _weight(
    tensors: Sequence[torch.Tensor | None], how: tuple | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns W [out, in] in float8 with its scale."""
    *of, scale = tensors
    if how is None:
        return of[0], scale
    return four_bit_float8(*of, *how, scale, False), scale


def _weight_t(
    tensors: Sequence[torch.Tensor | None], how: tuple | None, after: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns W^T [in, out] in float8 with its scale; in 4 bits it is given back `after` that."""
    *of, scale = tensors
    if how is None:
        return of[0], scale
    return four_bit_float8(*of, *how, scale, True, after), scale


# A [rank, in], B [out, rank] and s of a layer
_Adapter = tuple[torch.Tensor, torch.Tensor, float]


def _adapters(
    scales: Sequence[float | None], matrices: Sequence[torch.Tensor]
) -> list[_Adapter | None]:
    each = iter(matrices)
    return [None if one is None else (next(each), next(each), one) for one in scales]


def _joined_a(adapters: Sequence[_Adapter | None], dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([one[0].to(dtype) for one in adapters if one is not None])


def _project(x: torch.Tensor, adapters: Sequence[_Adapter | None]) -> list[torch.Tensor | None]:
    """Returns each adapter's h = x A^T, of one product."""
    ranks = [len(one[0]) for one in adapters if one is not None]
    if not ranks:
        return [None for _ in adapters]
    parts = iter((x @ _joined_a(adapters, x.dtype).t()).split(ranks, 1))
    return [None if one is None else next(parts) for one in adapters]


def _add(y: torch.Tensor, h: torch.Tensor | None, adapter: _Adapter | None) -> torch.Tensor:
    """Returns y, to which s h B^T was added."""
    if adapter is not None:
        add_product_(y, h, adapter[1].to(y.dtype).t(), adapter[2])
    return y


def _into_h(
    into_ys: Sequence[torch.Tensor], adapters: Sequence[_Adapter | None]
) -> torch.Tensor | None:
    """Returns the gradients of every h side by side, from those of their outputs."""
    pairs = zip(into_ys, adapters, strict=True)
    parts = [y @ one[1].to(y.dtype) * one[2] for y, one in pairs if one is not None]
    return torch.cat(parts, 1) if parts else None


def _add_through_a(
    into_x: torch.Tensor, into_h: torch.Tensor | None, adapters: Sequence[_Adapter | None]
) -> torch.Tensor:
    """Returns the gradient of an input, to which what comes from every h was added."""
    if into_h is not None:
        add_product_(into_x, into_h, _joined_a(adapters, into_x.dtype), 1.0)
    return into_x


def _into_adapters(
    x: torch.Tensor | None,
    into_h: torch.Tensor | None,
    into_ys: Sequence[torch.Tensor],
    hs: Sequence[torch.Tensor | None],
    adapters: Sequence[_Adapter | None],
) -> list[torch.Tensor]:
    """Returns the gradients of each adapter's A and B, in turn."""
    if into_h is None:
        return []
    into_a, found = into_h.t() @ x, []
    for into_y, h, one in zip(into_ys, hs, adapters, strict=True):
        if one is not None:
            a, b, scale = one
            found += [into_a[: len(a)].to(a.dtype), (into_y.t() @ h).to(b.dtype) * scale]
            into_a = into_a[len(a) :]
    return found
