"""Triton kernels that round an MLP's activation, and its gradients, to float8 where they make them.

A program holds a row: it reads it once, finds its largest absolute value, and writes it rounded.
Matrices are [rows, size] and contiguous, scales [rows, 1].
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
) -> None:
    """Fill `rounded` and `scale` with act = f(gate) up; f is SiLU or `gelu`'s tanh form.

    The largest absolute value of a row becomes `largest`. Fill `act` with act itself, if it is
    given.
    """
    rows, size = gate.shape
    _gated_to_float8[(rows,)](
        gate, up, rounded, scale, act, size, largest, gelu, act is not None, **_width(size)
    )


def gated_backward_to_float8_(
    gradient: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    gelu: bool,
    rounded: tuple[torch.Tensor, torch.Tensor],
    scales: tuple[torch.Tensor, torch.Tensor],
    whole: tuple[torch.Tensor, torch.Tensor] | None,
    keep_act: bool,
    largest: float,
) -> None:
    """Fill `rounded` and `scales` with the gradients of gate and up, from `gradient`, act's.

    Fill `whole` with the gradients themselves, if it is given. `gradient` is overwritten with act
    if `keep_act`.
    """
    rows, size = gate.shape
    _gated_backward_to_float8[(rows,)](
        gradient, gate, up, *rounded, *scales, *(whole or (None, None)), size, largest, gelu,
        whole is not None, keep_act, maxnreg=REGISTERS, **_width(size),
    )  # fmt: skip


def _width(size: int) -> dict[str, int]:
    width = triton.next_power_of_2(size)
    return {"WIDTH": width, "num_warps": min(max(width // (32 * HELD), 1), 32)}


@triton.jit
def larger_or_nan(x, y) -> "tl.tensor":
    """Returns the larger of both, as torch.maximum does: tl.maximum alone drops NaN."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _round(x, out, scale, row, size, at, inside, largest) -> None:
    """Write a row of x in float8, and its scale, which is NaN where an element is."""
    row_scale = larger_or_nan(tl.reduce(tl.abs(x), 0, larger_or_nan), 1e-12) / largest
    tl.store(scale + row, row_scale)
    small = tl.minimum(tl.maximum(x * (1.0 / row_scale), -largest), largest)
    tl.store(out + row * size + at, small.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_to_float8(
    gate, up, rounded, scale, act, size, largest,
    GELU: tl.constexpr, KEEP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside, place = at < size, row * size + at
    x = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    found = x * share(x, GELU) * tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    if KEEP:
        tl.store(act + place, found.to(act.dtype.element_ty), mask=inside)
    _round(found, rounded, scale, row, size, at, inside, largest)


@triton.jit
def _gated_backward_to_float8(
    gradient, gate, up, rounded_gate, rounded_up, scale_gate, scale_up, into_gate, into_up,
    size, largest,
    GELU: tl.constexpr, KEEP: tl.constexpr, KEEP_ACT: tl.constexpr, WIDTH: tl.constexpr,
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
    _round(of_gate, rounded_gate, scale_gate, row, size, at, inside, largest)
    _round(of_up, rounded_up, scale_up, row, size, at, inside, largest)
