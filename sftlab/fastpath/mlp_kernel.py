"""Triton kernels around the products of fused LoRA: gated activations, and gradients side by side.

Each reads and writes every element once, in a tile of some rows: consecutive threads touch
consecutive 16 bytes. Matrices are [rows, ...], and their rows may be parts of longer ones, so that
results stand in what the next product reads whole.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl

from sftlab.fastpath.ceil_div import ceil_div

# rows and columns of a tile, and warps
TILE = (1, 1024, 4)
COPIED = (4, 512, 4)


def gated(y: torch.Tensor, gelu: bool, out: torch.Tensor, tile: tuple = TILE) -> None:
    """Fill `out` [rows, size] with f(gate) up of y = [gate, up]; f is SiLU or `gelu`'s tanh form.

    The last dimension of both is contiguous.
    """
    rows, size = out.shape
    height, width, warps = tile
    _gated[_grid(rows, size, tile)](
        y, y.stride(0), out, out.stride(0), rows, size, gelu, height, width, num_warps=warps
    )


def gated_backward_(
    gradient: torch.Tensor, y: torch.Tensor, gelu: bool, out: torch.Tensor, tile: tuple = TILE
) -> None:
    """Fill `out` [rows, 2 size] with the gradients of gate and up, from that of `gated`'s output.

    `gradient` [rows, size] is overwritten with `gated`'s output itself.
    """
    rows, size = gradient.shape
    height, width, warps = tile
    _gated_backward[_grid(rows, size, tile)](
        gradient, gradient.stride(0), y, y.stride(0), out, out.stride(0), rows, size, gelu,
        height, width, num_warps=warps,
    )  # fmt: skip


def beside(parts: list[torch.Tensor], out: torch.Tensor, tile: tuple = COPIED) -> None:
    """Fill `out` [rows, ...] with one to three `parts` [rows, ...] side by side, then zeros."""
    rows, columns = out.shape
    height, width, warps = tile
    given, ends = three_parts(parts)
    _beside[_grid(rows, columns, tile)](
        *given, out, out.stride(0), rows, columns, *ends, height, width, num_warps=warps,
    )  # fmt: skip


def three_parts(parts: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor | int], list[int]]:
    """Returns what a kernel takes of one to three `parts` [rows, ...] side by side.

    That is each with its stride, the first one in the place of those that lack, and the column
    behind each.
    """
    given = (*parts, parts[0], parts[0])[:3]
    sizes = [part.shape[1] for part in parts] + [0] * (3 - len(parts))
    return [one for part in given for one in (part, part.stride(0))], list(accumulate(sizes))


def _grid(rows: int, columns: int, tile: tuple) -> tuple[int]:
    return (ceil_div(rows, tile[0]) * ceil_div(columns, tile[1]),)


@triton.jit
def _place(columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """This program's rows [HEIGHT, 1] and columns [1, WIDTH]."""
    across = tl.cdiv(columns, WIDTH)
    row = tl.program_id(0) // across * HEIGHT + tl.arange(0, HEIGHT)
    at = tl.program_id(0) % across * WIDTH + tl.arange(0, WIDTH)
    return row.to(tl.int64)[:, None], at[None, :]


@triton.jit
def gate_and_up(y, row, at, size, inside) -> tuple[tl.tensor, tl.tensor]:
    """What `inside` holds of gate and up in float32; `row` is where rows of y begin."""
    gate = tl.load(y + row + at, mask=inside, other=0.0).to(tl.float32)
    return gate, tl.load(y + row + at + size, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def share(x, GELU: tl.constexpr) -> tl.tensor:
    """The share of x that the activation lets through.

    The tanh form of GELU is x sigmoid(2 c (x + d x^3)): c is sqrt(2 / pi), d 0.044715.
    """
    if GELU:
        return tl.sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * x * x))
    else:
        return tl.sigmoid(x)


@triton.jit
def gradients(into, gate, up, GELU: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The gradients of gate and up from that of f(gate) up, and f(gate) up itself."""
    part = share(gate, GELU)
    passed = gate * part
    slope = passed * (1.0 - part)
    if GELU:
        slope *= 1.5957691216057308 + 0.21406444881780074 * gate * gate
    return into * up * (part + slope), into * passed, passed * up


@triton.jit(do_not_specialize=["rows"])
def _gated(
    y, y_stride, out, out_stride, rows, size,
    GELU: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, at = _place(size, HEIGHT, WIDTH)
    inside = (row < rows) & (at < size)
    gate, up = gate_and_up(y, row * y_stride, at, size, inside)
    found = gate * share(gate, GELU) * up
    tl.store(out + row * out_stride + at, found.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _gated_backward(
    gradient, gradient_stride, y, y_stride, out, out_stride, rows, size,
    GELU: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, at = _place(size, HEIGHT, WIDTH)
    inside = (row < rows) & (at < size)
    gate, up = gate_and_up(y, row * y_stride, at, size, inside)
    act_place = gradient + row * gradient_stride + at
    into = tl.load(act_place, mask=inside, other=0.0).to(tl.float32)
    into_gate, into_up, act = gradients(into, gate, up, GELU)
    places = out + row * out_stride + at
    tl.store(places, into_gate.to(out.dtype.element_ty), mask=inside)
    tl.store(places + size, into_up.to(out.dtype.element_ty), mask=inside)
    tl.store(act_place, act.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def of_three(
    one, one_stride, two, two_stride, three, three_stride, row, at, first, second, third, inside
) -> "tl.tensor":
    """What `inside` holds of three matrices side by side, which end at these columns."""
    in_one, in_two = at < first, (at >= first) & (at < second)
    in_three = (at >= second) & (at < third)
    a = tl.load(one + row * one_stride + at, mask=inside & in_one, other=0.0)
    b = tl.load(two + row * two_stride + (at - first), mask=inside & in_two, other=0.0)
    c = tl.load(three + row * three_stride + (at - second), mask=inside & in_three, other=0.0)
    return tl.where(in_one, a, tl.where(in_two, b, c))


@triton.jit(do_not_specialize=["rows"])
def _beside(
    one, one_stride, two, two_stride, three, three_stride, out, out_stride,
    rows, columns, first, second, third, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, at = _place(columns, HEIGHT, WIDTH)
    inside = row < rows
    found = of_three(
        one, one_stride, two, two_stride, three, three_stride, row, at, first, second, third, inside
    )
    tl.store(out + row * out_stride + at, found, mask=inside & (at < columns))
