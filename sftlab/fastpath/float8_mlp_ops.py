"""Steps of an MLP in float8 that torch.compile takes as they are: see mlp_ops.py.

Its own kernels read every row twice, once for its scale. On a GPU these are kernels of
float8_mlp_kernel.py; on a CPU plain torch.
"""

import torch

from sftlab.fastpath.float8 import BACKWARD, FORWARD, to_float8
from sftlab.fastpath.mlp_ops import gated_backward_, has_kernels
from sftlab.models.gated_mlp import activation


@torch.library.custom_op("sftlab::gated_to_float8", mutates_args=())
def gated_to_float8(
    gate: torch.Tensor, up: torch.Tensor, tanh_gelu: bool, keep_act: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns act = f(gate) up of [rows, size] in float8, its scales, and act if `keep_act`.

    act is [0, size] otherwise.
    """
    rounded, scale, act = _gated_room(gate, keep_act)
    if has_kernels(gate):
        from sftlab.fastpath import float8_mlp_kernel

        float8_mlp_kernel.gated_to_float8(
            gate.contiguous(), up.contiguous(), tanh_gelu, rounded, scale,
            act if keep_act else None, torch.finfo(FORWARD).max,
        )  # fmt: skip
        return rounded, scale, act
    found = activation(gate.float(), tanh_gelu) * up
    if keep_act:
        act.copy_(found)
    return *to_float8(found, FORWARD, by_row=True), act


gated_to_float8.register_fake(lambda gate, up, tanh_gelu, keep_act: _gated_room(gate, keep_act))


@torch.library.custom_op("sftlab::gated_backward_to_float8", mutates_args=("gradient",))
def gated_backward_to_float8_(
    gradient: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    tanh_gelu: bool,
    keep: bool,
    keep_act: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of gate and up [rows, size], from `gradient`, that of f(gate) up.

    They are that of gate in float8, its scales, the same of up, and if `keep` both themselves,
    [0, size] otherwise. `gradient` is overwritten with f(gate) up if `keep_act`.
    """
    found = _backward_room(gate, keep)
    if has_kernels(gate):
        from sftlab.fastpath import float8_mlp_kernel

        float8_mlp_kernel.gated_backward_to_float8_(
            gradient, gate.contiguous(), up.contiguous(), tanh_gelu, found[0:4:2], found[1:4:2],
            found[4:] if keep else None, keep_act, torch.finfo(BACKWARD).max,
        )  # fmt: skip
        return found
    size = gate.shape[1]
    act, into_y = gradient.clone(), gradient.new_empty(len(gate), 2 * size, dtype=torch.float32)
    gated_backward_(act, torch.cat([gate, up], 1), tanh_gelu, into_y)
    if keep_act:
        gradient.copy_(act)
    for part, into in zip(into_y.split(size, 1), found[4:], strict=True):
        into.copy_(part[: len(into)])
    gate8, up8 = (to_float8(part, BACKWARD, by_row=True) for part in into_y.split(size, 1))
    return *gate8, *up8, *found[4:]


gated_backward_to_float8_.register_fake(
    lambda gradient, gate, up, tanh_gelu, keep, keep_act: _backward_room(gate, keep)
)


@torch.library.custom_op("sftlab::add_product", mutates_args=("y",))
def add_product_(y: torch.Tensor, h: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """Add scale h b to y [rows, out], in place, from [rows, ranks] and [ranks, out].

    addmm would copy y first.
    """
    y.addmm_(h, b, alpha=scale)


add_product_.register_fake(lambda y, h, b, scale: None)


def _gated_room(gate: torch.Tensor, keep: bool) -> tuple[torch.Tensor, ...]:
    rows, size = gate.shape
    return *_rounded_room(gate, FORWARD), gate.new_empty(rows if keep else 0, size)


def _backward_room(gate: torch.Tensor, keep: bool) -> tuple[torch.Tensor, ...]:
    rows, size = gate.shape
    whole = (gate.new_empty(rows if keep else 0, size) for _ in range(2))
    return *_rounded_room(gate, BACKWARD), *_rounded_room(gate, BACKWARD), *whole


def _rounded_room(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(x.shape[0], 1, dtype=torch.float32),
    )
