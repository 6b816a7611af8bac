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
    gate: torch.Tensor,
    up: torch.Tensor,
    tanh_gelu: bool,
    keep_act: bool,
    ranks: int = 0,
    room: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns act = f(gate) up of [rows, size] in float8, its scales, and act if `keep_act`.

    act itself is [0, size] if it is not kept. Beside act in float8 are `ranks` columns to fill. The
    scale of a row leaves room for values `room` [1] times its largest one.
    """
    rounded, scale, act = _gated_room(gate, keep_act, ranks)
    if has_kernels(gate):
        from sftlab.fastpath import float8_mlp_kernel

        float8_mlp_kernel.gated_to_float8(
            gate.contiguous(), up.contiguous(), tanh_gelu, rounded, scale,
            act if keep_act else None, torch.finfo(FORWARD).max, room,
        )  # fmt: skip
        return rounded, scale, act
    found = activation(gate.float(), tanh_gelu) * up
    if keep_act:
        act.copy_(found)
    most = None if room is None else room * found.abs().amax(1, keepdim=True)
    return *_rounded(found, FORWARD, ranks, most), act


gated_to_float8.register_fake(
    lambda gate, up, tanh_gelu, keep_act, ranks=0, room=None: _gated_room(gate, keep_act, ranks)
)


@torch.library.custom_op("sftlab::gated_backward_to_float8", mutates_args=("gradient",))
def gated_backward_to_float8_(
    gradient: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    tanh_gelu: bool,
    keep: bool,
    keep_act: bool,
    ranks: int = 0,
    room: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of gate and up [rows, size], from `gradient`, that of f(gate) up.

    They are that of gate in float8, its scales, the same of up, and if `keep` both themselves,
    [0, size] otherwise. Beside that of up in float8 are `ranks` columns to fill; `room` is as in
    gated_to_float8, and with it both have the larger scale. `gradient` is overwritten with
    f(gate) up if `keep_act`.
    """
    found = _backward_room(gate, keep, ranks)
    if has_kernels(gate):
        from sftlab.fastpath import float8_mlp_kernel

        float8_mlp_kernel.gated_backward_to_float8_(
            gradient, gate.contiguous(), up.contiguous(), tanh_gelu, found[0:4:2], found[1:4:2],
            found[4:] if keep else None, keep_act, torch.finfo(BACKWARD).max, room,
        )  # fmt: skip
        return found
    size = gate.shape[1]
    act, into_y = gradient.clone(), gradient.new_empty(len(gate), 2 * size, dtype=torch.float32)
    gated_backward_(act, torch.cat([gate, up], 1), tanh_gelu, into_y)
    if keep_act:
        gradient.copy_(act)
    for part, into in zip(into_y.split(size, 1), found[4:], strict=True):
        into.copy_(part[: len(into)])
    of_gate, of_up = into_y.split(size, 1)
    most = None if room is None else room * into_y.abs().amax(1, keepdim=True)
    gate8, up8 = _rounded(of_gate, BACKWARD, 0, most), _rounded(of_up, BACKWARD, ranks, most)
    return *gate8, *up8, *found[4:]


gated_backward_to_float8_.register_fake(
    lambda gradient, gate, up, tanh_gelu, keep, keep_act, ranks=0, room=None: _backward_room(
        gate, keep, ranks
    )
)


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


def _backward_room(gate: torch.Tensor, keep: bool, ranks: int) -> tuple[torch.Tensor, ...]:
    rows, size = gate.shape
    whole = (gate.new_empty(rows if keep else 0, size) for _ in range(2))
    of_gate, of_up = (rounded_room(gate, size + more, BACKWARD) for more in (0, ranks))
    return *of_gate, *of_up, *whole


def rounded_room(
    x: torch.Tensor, columns: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns room for x's rows in float8 with so many columns, and for their scales."""
    rows = x.shape[0]
    return x.new_empty(rows, columns, dtype=dtype), x.new_empty(rows, 1, dtype=torch.float32)


def _rounded(
    x: torch.Tensor, dtype: torch.dtype, ranks: int, most: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x in float8, plainly, beside `ranks` columns to fill, and its scales.

    They leave room for values as large as `most` [rows, 1].
    """
    if most is None:
        rounded, scale = to_float8(x, dtype, by_row=True)
    else:
        scale = scale_of(most, dtype)
        rounded = over(x, scale, dtype)
    return (side_by_side(rounded, rounded[:, :1].expand(-1, ranks)) if ranks else rounded), scale


def side_by_side(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Returns two float8 matrices, or stacks of them, side by side: torch cannot join such."""
    found = torch.cat([each.view(torch.uint8) for each in (one, other)], -1)
    return found.view(one.dtype)
