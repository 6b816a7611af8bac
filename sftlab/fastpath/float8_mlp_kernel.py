"""Triton kernels that round an MLP's activation, and its gradients, to float8 where they make them.

A program holds a row: it reads it once, finds its largest absolute value, and writes it rounded.
Matrices are [rows, size] and contiguous, those in float8 with any stride of rows, scales [rows, 1].
"""

import torch
import triton
import triton.language as tl

from sftlab.fastpath.mlp_kernel import gradients, share

# elements of a row that a thread holds of every matrix
HELD = 16
# of a thread, so that two programs of 16 warps run beside one another
REGISTERS = 64


def gated_to_float8(
    gate: torch.Tensor,
    up: torch.Tensor,
    gelu: bool,
    rounded: torch.Tensor,
    scale: torch.Tensor,
    act: torch.Tensor | None,
    largest: float,
    room: torch.Tensor | None = None,
    steepest: torch.Tensor | None = None,
) -> None:
    """Fill `rounded` and `scale` with act = f(gate) up; f is SiLU or `gelu`'s tanh form.

    The largest absolute value of a row becomes `largest`, over `room` [1] if it is given. Fill
    `act` with act itself, if it is given, and `steepest` [rows, 1] with the largest slope of act in
    a row: as gate or as up changes.
    """
    rows, size = gate.shape
    _gated_to_float8[(rows,)](
        gate,
        up,
        rounded,
        rounded.stride(0),
        scale,
        act,
        size,
        largest,
        room,
        steepest,
        gelu,
        act is not None,
        room is not None,
        steepest is not None,
        **row_width(size),
    )


def gated_backward_to_float8_(
    gradient: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    gelu: bool,
    rounded: tuple[torch.Tensor, torch.Tensor],
    scales: tuple[torch.Tensor, torch.Tensor] | None,
    whole: tuple[torch.Tensor, torch.Tensor] | None,
    keep_act: bool,
    largest: float,
    given: torch.Tensor | None = None,
) -> None:
    """Fill `rounded` and `scales` with the gradients of gate and up, from `gradient`, act's.

    The largest absolute value of a row becomes `largest`, unless the scale of both is `given`
    [rows, 1]. Fill `whole` with the gradients themselves, if it is there. `gradient` is overwritten
    with act if `keep_act`.
    """
    rows, size = gate.shape
    _gated_backward_to_float8[(rows,)](
        gradient, gate, up, rounded[0], rounded[0].stride(0), rounded[1], rounded[1].stride(0),
        *(scales or (None, None)), *(whole or (None, None)), size, largest, given, gelu,
        whole is not None, keep_act, given is not None, maxnreg=REGISTERS, **row_width(size),
    )  # fmt: skip


def row_width(size: int) -> dict[str, int]:
    """Returns how a program holds a row of so many columns."""
    width = triton.next_power_of_2(size)
    return {"WIDTH": width, "num_warps": min(max(width // (32 * HELD), 1), 32)}


@triton.jit
def larger_or_nan(x, y) -> "tl.tensor":
    """Returns the larger of both, as torch.maximum does: tl.maximum alone drops NaN."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_scale_of(x, largest) -> "tl.tensor":
    """Returns the scale of a row x in float8, which is NaN where an element is."""
    return larger_or_nan(tl.reduce(tl.abs(x), 0, larger_or_nan), 1e-12) / largest


@triton.jit
def within(x, largest) -> "tl.tensor":
    """Returns x, `largest` at most in absolute value; NaN stays."""
    return tl.where(x == x, tl.minimum(tl.maximum(x, -largest), largest), x)


@triton.jit
def _round(x, row_scale, out, out_stride, row, at, inside, largest) -> None:
    """Write a row of x over its scale in float8."""
    small = within(x * (1.0 / row_scale), largest)
    tl.store(out + row * out_stride + at, small.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_to_float8(
    gate, up, rounded, rounded_stride, scale, act, size, largest, room, steepest,
    GELU: tl.constexpr, KEEP: tl.constexpr, ROOM: tl.constexpr, STEEPEST: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    if ROOM:
        largest = largest / tl.load(room)
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside, place = at < size, row * size + at
    x = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    if STEEPEST:
        by_gate, by_up, found = gradients(1.0, x, y, GELU)
        slope = larger_or_nan(tl.abs(by_gate), tl.abs(by_up))
        tl.store(steepest + row, tl.reduce(slope, 0, larger_or_nan))
    else:
        found = x * share(x, GELU) * y
    if KEEP:
        tl.store(act + place, found.to(act.dtype.element_ty), mask=inside)
    row_scale = row_scale_of(found, largest)
    tl.store(scale + row, row_scale)
    _round(found, row_scale, rounded, rounded_stride, row, at, inside, largest)


@triton.jit
def _gated_backward_to_float8(
    gradient, gate, up, rounded_gate, gate_stride, rounded_up, up_stride, scale_gate, scale_up,
    into_gate, into_up, size, largest, given,
    GELU: tl.constexpr, KEEP: tl.constexpr, KEEP_ACT: tl.constexpr, GIVEN: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside, place = at < size, row * size + at
    into = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    of_gate, of_up, act = gradients(into, x, y, GELU)
    if KEEP_ACT:
        tl.store(gradient + place, act.to(gradient.dtype.element_ty), mask=inside)
    if KEEP:
        tl.store(into_gate + place, of_gate.to(into_gate.dtype.element_ty), mask=inside)
        tl.store(into_up + place, of_up.to(into_up.dtype.element_ty), mask=inside)
    if GIVEN:
        gate_scale = tl.load(given + row)
        up_scale = gate_scale
    else:
        gate_scale, up_scale = row_scale_of(of_gate, largest), row_scale_of(of_up, largest)
        tl.store(scale_gate + row, gate_scale)
        tl.store(scale_up + row, up_scale)
    _round(of_gate, gate_scale, rounded_gate, gate_stride, row, at, inside, largest)
    _round(of_up, up_scale, rounded_up, up_stride, row, at, inside, largest)
