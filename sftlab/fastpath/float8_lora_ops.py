"""Steps of fused LoRA in float8 that torch.compile takes as they are: see mlp_ops.py.

On a GPU these are kernels of float8_join_kernel.py and float8_mlp_kernel.py, or of
gated_lora_kernel.py where those can run; on a CPU plain torch. Products are within, so that a step
is one operation: each takes the host some time.
"""

from collections.abc import Sequence

import torch

from sftlab.fastpath.float8 import BACKWARD, FORWARD, float8_product, over, scale_of
from sftlab.fastpath.float8_mlp_ops import (
    gated_gradients,
    round_gated,
    rounded_room,
    side_by_side,
)
from sftlab.fastpath.mlp_ops import by_rows, has_kernels, kernels_with_lora


@torch.library.custom_op("sftlab::join_in_float8", mutates_args=())
def join_in_float8(
    parts: Sequence[torch.Tensor], h: torch.Tensor, factor: torch.Tensor, backward: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns up to three `parts` [rows, ...] side by side and then `factor` h, in float8.

    h is [rows, ranks], `factor` [1]. A row has one scale, the second tensor, [rows, 1]. The format
    is that of gradients in a `backward`.
    """
    return _joined(parts, h, factor, BACKWARD if backward else FORWARD)[:2]


join_in_float8.register_fake(
    lambda parts, h, factor, backward: _joined_room(parts, h, BACKWARD if backward else FORWARD)
)


@torch.library.custom_op("sftlab::gated_down_in_float8", mutates_args=())
def gated_down_in_float8(
    gate: torch.Tensor,
    up: torch.Tensor,
    wide: torch.Tensor,
    a: torch.Tensor,
    scale: torch.Tensor,
    factor: torch.Tensor,
    room: torch.Tensor,
    tanh_gelu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The down product of act = f(gate) up beside `factor` h, in float8, with h = act A^T.

    `gate` and `up` are [rows, size]. `wide` [out, size + ranks] is down's W beside s B, and `a`
    [ranks, size] its A; `scale` is that of `wide`. A row's scale leaves room for values `room` [1]
    times its largest one. Returns the output [rows, out], h [rows, ranks], and the largest slope of
    act in each row, as gate or as up changes, [rows, 1].
    """
    act8, row_scale, act, steepest = round_gated(gate, up, tanh_gelu, True, len(a), room)
    h = act @ a.t()
    fill_ranks(h, factor, row_scale, act8)
    return float8_product(act8, row_scale, wide, scale), h, steepest


@gated_down_in_float8.register_fake
def _(
    gate: torch.Tensor, up: torch.Tensor, wide: torch.Tensor, a: torch.Tensor, *rest: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = gate.shape[0]
    steepest = gate.new_empty(rows, 1, dtype=torch.float32)
    return gate.new_empty(rows, wide.shape[0]), gate.new_empty(rows, a.shape[0]), steepest


@torch.library.custom_op("sftlab::gated_backward_in_float8", mutates_args=())
def gated_backward_in_float8(
    gradient: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    factor: torch.Tensor,
    tall_down: torch.Tensor,
    b_down: torch.Tensor,
    scale_down: torch.Tensor,
    factor_down: torch.Tensor,
    larger: torch.Tensor,
    rank: int,
    rank_down: int,
    tanh_gelu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of gate, up and LoRA from `gradient` [rows, out], that of down's output.

    `h` [rows, ranks] and `b` [2 size, ranks], s B, have `rank` columns of gate, then of up; where
    both stand there twice, so does the gradient of h. `tall_down` [size, out + ranks] is down's W^T
    beside A^T, with `scale_down`, and `b_down` [out, ranks] its s B, of which `rank_down` columns
    are not 0. What is joined in float8 is `factor` times h's gradients. Gradients of gate and up
    are at most `larger` [rows, 1] times the norm of what is joined to `gradient`'s row.

    Returns those of gate, and of up beside LoRA's, in float8 with each row's scale [rows, 1]; that
    of h; that of s B, right in each part's own columns; and that of down's A [ranks, size].
    """
    into_h_down = gradient @ b_down
    joined, joined_scale, norm = _joined([gradient], into_h_down, factor_down, BACKWARD, True)
    into_act = float8_product(joined, joined_scale, tall_down, scale_down)
    del joined
    scale = scale_of(norm * larger, BACKWARD)
    size, ranks = gate.shape[1], b.shape[1]
    gate8, up8 = _gradients_room(gate, ranks)
    room = up8[:, :size]
    with_lora = kernels_with_lora(gate, rank) and kernels_with_lora(gate, rank_down)
    if with_lora:
        into_h = gate.new_empty(len(gate), ranks)
        into_b, into_a_down = with_lora.gated_backward_with_lora_to_float8(
            into_act, by_rows(gate), by_rows(up), h, b, into_h_down, rank, rank_down, tanh_gelu,
            scale, gate8, room, into_h,
        )  # fmt: skip
        if stand_twice(2 * rank, ranks):
            into_h[:, 2 * rank : 4 * rank] = into_h[:, : 2 * rank]
    else:
        into_ys, act = _round_gradients(into_act, gate, up, tanh_gelu, scale, gate8, room)
        into_h = into_ys[0] @ b[:size] + into_ys[1] @ b[size:]
        into_b = torch.cat([into_y.t() @ h for into_y in into_ys])
        into_a_down = into_h_down.t() @ act
    fill_ranks(into_h, factor, scale, up8)
    return gate8, up8, scale, into_h, into_b, into_a_down


@gated_backward_in_float8.register_fake
def _(
    gradient: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    factor: torch.Tensor,
    tall_down: torch.Tensor,
    b_down: torch.Tensor,
    *rest: object,
) -> tuple[torch.Tensor, ...]:
    (rows, size), ranks = gate.shape, b.shape[1]
    return (
        *_gradients_room(gate, ranks),
        gate.new_empty(rows, 1, dtype=torch.float32),
        gate.new_empty(rows, ranks),
        gate.new_empty(2 * size, ranks),
        gate.new_empty(b_down.shape[1], size),
    )


def fill_ranks(
    h: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, out: torch.Tensor
) -> None:
    """Fill the last columns of `out` [rows, ... + ranks] with `factor` h over each row's scale.

    h is [rows, ranks], `factor` [1], `scale` [rows, 1]. What is beyond the largest number becomes
    that.
    """
    room = out[:, out.shape[1] - h.shape[1] :]
    if not has_kernels(h):
        found = over(h.float() * factor, scale, out.dtype)
        room.view(torch.uint8).copy_(found.view(torch.uint8))
        return
    from sftlab.fastpath import float8_join_kernel

    largest = torch.finfo(out.dtype).max
    float8_join_kernel.fill_ranks(by_rows(h), factor, scale, room, largest)


def stand_twice(ranks: int, columns: int) -> bool:
    """Whether so many ranks stand twice in so many columns: see Float8Input."""
    return 2 * ranks <= columns


def _round_gradients(
    into_act: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    tanh_gelu: bool,
    scale: torch.Tensor,
    gate8: torch.Tensor,
    up8: torch.Tensor,
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Fill gate8 and up8 [rows, size]; return the gradients of gate and up themselves, and act.

    act may be in the place of `into_act`, its gradient.
    """
    if has_kernels(gate):
        from sftlab.fastpath import float8_mlp_kernel

        whole, largest = (torch.empty_like(gate), torch.empty_like(gate)), torch.finfo(BACKWARD).max
        float8_mlp_kernel.gated_backward_to_float8_(
            into_act, gate.contiguous(), up.contiguous(), tanh_gelu, (gate8, up8), None, whole,
            True, largest, scale,
        )  # fmt: skip
        return whole, into_act
    *whole, act = gated_gradients(into_act, gate, up, tanh_gelu)
    for out, gradient in zip((gate8, up8), whole, strict=True):
        out.view(torch.uint8).copy_(over(gradient, scale, BACKWARD).view(torch.uint8))
    return tuple(one.to(gate.dtype) for one in whole), act


def _joined(
    parts: Sequence[torch.Tensor],
    h: torch.Tensor,
    factor: torch.Tensor,
    dtype: torch.dtype,
    norms: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns rows and scales as join_in_float8 does, and if `norms` each row's norm, [rows, 1]."""
    largest = torch.finfo(dtype).max
    if has_kernels(h):
        from sftlab.fastpath import float8_join_kernel

        out, scale = _joined_room(parts, h, dtype)
        norm = torch.empty_like(scale) if norms else None
        by_row = [by_rows(part) for part in parts]
        float8_join_kernel.join_in_float8(by_row, by_rows(h), factor, out, scale, largest, norm)
        return out, scale, norm
    whole = torch.cat([*(part.float() for part in parts), h.float() * factor], 1)
    scale = scale_of(whole.abs().amax(1, keepdim=True), dtype)
    x, y = whole.split([whole.shape[1] - h.shape[1], h.shape[1]], 1)
    norm = (whole / scale).norm(dim=1, keepdim=True) * scale if norms else None
    return side_by_side(over(x, scale, dtype), over(y, scale, dtype)), scale, norm


def _gradients_room(gate: torch.Tensor, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, size = gate.shape
    return tuple(gate.new_empty(rows, size + more, dtype=BACKWARD) for more in (0, ranks))


def _joined_room(
    parts: Sequence[torch.Tensor], h: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    columns = sum(part.shape[1] for part in parts) + h.shape[1]
    return rounded_room(h, columns, dtype)
