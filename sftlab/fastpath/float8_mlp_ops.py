"""Steps of an MLP in float8 that torch.compile takes as they are: see mlp_ops.py.

Its own kernels read every row twice, once for its scale. On a GPU these are kernels of
float8_mlp_kernel.py; on a CPU plain torch.
"""

import torch

from sftlab.fastpath.float8 import BACKWARD, FORWARD, over, scale_of, to_float8
from sftlab.fastpath.mlp_ops import gated_backward_, has_kernels
from sftlab.models.gated_mlp import activation

# columns of a row that a program of the kernels holds
LARGEST_SIZE = 16384


@torch.library.custom_op("sftlab::gated_to_float8", mutates_args=())
def gated_to_float8(
    gate: torch.Tensor, up: torch.Tensor, tanh_gelu: bool, keep_act: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns act = f(gate) up of [rows, size] in float8, its scales, and act if `keep_act`.

    act itself is [0, size] if it is not kept.
    """
    return round_gated(gate, up, tanh_gelu, keep_act)[:3]


gated_to_float8.register_fake(lambda gate, up, tanh_gelu, keep_act: _gated_room(gate, keep_act, 0))


def round_gated(
    gate: torch.Tensor,
    up: torch.Tensor,
    tanh_gelu: bool,
    keep_act: bool,
    ranks: int = 0,
    room: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As gated_to_float8, with `ranks` columns to fill beside act in float8.

    The scale of a row leaves room for values `room` [1] times its largest one. With `room` the last
    tensor is the largest slope of act in each row, as gate or as up changes: [rows, 1].
    """
    rounded, scale, act = _gated_room(gate, keep_act, ranks)
    steepest = None if room is None else torch.empty_like(scale)
    if has_kernels(gate):
        from sftlab.fastpath import float8_mlp_kernel

        float8_mlp_kernel.gated_to_float8(
            gate.contiguous(), up.contiguous(), tanh_gelu, rounded, scale,
            act if keep_act else None, torch.finfo(FORWARD).max, room, steepest,
        )  # fmt: skip
        return rounded, scale, act, steepest
    found = activation(gate.float(), tanh_gelu) * up
    if keep_act:
        act.copy_(found)
    if room is None:
        return *to_float8(found, FORWARD, by_row=True), act, None
    by_gate, by_up, _ = gated_gradients(torch.ones_like(gate), gate, up, tanh_gelu)
    steepest.copy_(torch.maximum(by_gate.abs(), by_up.abs()).amax(1, keepdim=True))
    scale = scale_of(room * found.abs().amax(1, keepdim=True), FORWARD)
    rounded = over(found, scale, FORWARD)
    return side_by_side(rounded, rounded[:, :1].expand(-1, ranks)), scale, act, steepest


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
    of_gate, of_up, act = gated_gradients(gradient, gate, up, tanh_gelu)
    if keep_act:
        gradient.copy_(act)
    for part, into in zip((of_gate, of_up), found[4:], strict=True):
        into.copy_(part[: len(into)])
    rounded = (to_float8(one, BACKWARD, by_row=True) for one in (of_gate, of_up))
    return *(one for pair in rounded for one in pair), *found[4:]


gated_backward_to_float8_.register_fake(
    lambda gradient, gate, up, tanh_gelu, keep, keep_act: _backward_room(gate, keep)
)


def gated_gradients(
    gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, tanh_gelu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of gate and up in float32, and f(gate) up, in plain torch."""
    act, into_y = gradient.clone(), gradient.new_empty(len(gate), 2 * gate.shape[1]).float()
    gated_backward_(act, torch.cat([gate, up], 1), tanh_gelu, into_y)
    return *into_y.chunk(2, 1), act


@torch.library.custom_op("sftlab::add_product", mutates_args=("y",))
def add_product_(y: torch.Tensor, h: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """Add scale h b to y [rows, out], in place, from [rows, ranks] and [ranks, out].

    addmm would copy y first.
    """
    y.addmm_(h, b, alpha=scale)


add_product_.register_fake(lambda y, h, b, scale: None)


def _gated_room(gate: torch.Tensor, keep: bool, ranks: int) -> tuple[torch.Tensor, ...]:
    rows, size = gate.shape
    return *rounded_room(gate, size + ranks, FORWARD), gate.new_empty(rows if keep else 0, size)


def _backward_room(gate: torch.Tensor, keep: bool) -> tuple[torch.Tensor, ...]:
    rows, size = gate.shape
    whole = (gate.new_empty(rows if keep else 0, size) for _ in range(2))
    of_gate, of_up = (rounded_room(gate, size, BACKWARD) for _ in range(2))
    return *of_gate, *of_up, *whole


def rounded_room(
    x: torch.Tensor, columns: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns room for x's rows in float8 with so many columns, and for their scales."""
    rows = x.shape[0]
    return x.new_empty(rows, columns, dtype=dtype), x.new_empty(rows, 1, dtype=torch.float32)


def side_by_side(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Returns two float8 matrices, or stacks of them, side by side: torch cannot join such."""
    found = torch.cat([each.view(torch.uint8) for each in (one, other)], -1)
    return found.view(one.dtype)
