"""Triton kernels that round rows to float8 beside what LoRA made of them.

Matrices are [rows, ...] with any stride of rows, scales [rows, 1].
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sftlab.fastpath.ceil_div import ceil_div
from sftlab.fastpath.float8_mlp_kernel import larger_or_nan, row_scale_of, row_width, within
from sftlab.fastpath.mlp_kernel import of_three, three_parts

# rows that a program of `fill_ranks` holds
HEIGHT = 32


def join_in_float8(
    parts: Sequence[torch.Tensor],
    h: torch.Tensor,
    factor: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor,
    largest: float,
    norm: torch.Tensor | None = None,
) -> None:
    """Fill `out` and `scale` with up to three `parts` side by side, and then `factor` h.

    The largest absolute value of a row, LoRA's part included, becomes `largest`. Fill `norm`
    [rows, 1] with each row's norm before it is rounded, if it is given.
    """
    given, ends = three_parts(parts)
    _join[(len(out),)](
        *given, h, h.stride(0), factor, out, out.stride(0), scale, norm, *ends, h.shape[1], largest,
        triton.next_power_of_2(h.shape[1]), norm is not None, **row_width(ends[-1]),
    )  # fmt: skip


def fill_ranks(
    h: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, largest: float
) -> None:
    """Fill `out` [rows, ranks] with `factor` h over each row's `scale`, `largest` at most."""
    rows, ranks = h.shape
    _fill_ranks[(ceil_div(rows, HEIGHT),)](
        h, h.stride(0), factor, scale, out, out.stride(0), rows, ranks, largest,
        HEIGHT, triton.next_power_of_2(ranks),
    )  # fmt: skip


@triton.jit
def _join(
    one, one_stride, two, two_stride, three, three_stride, h, h_stride, factor, out, out_stride,
    scale, norm, first, second, third, ranks, largest, RANKS: tl.constexpr, NORM: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside = at < third
    x = of_three(
        one, one_stride, two, two_stride, three, three_stride, row, at, first, second, third, inside
    ).to(tl.float32)
    rank = tl.arange(0, RANKS)
    y = tl.load(h + row * h_stride + rank, mask=rank < ranks, other=0.0).to(tl.float32)
    y *= tl.load(factor)
    row_scale = larger_or_nan(row_scale_of(x, largest), row_scale_of(y, largest))
    tl.store(scale + row, row_scale)
    if NORM:  # of what is at most 1, whose squares are numbers
        x_part, y_part = x / row_scale / largest, y / row_scale / largest
        squares = tl.sum(x_part * x_part) + tl.sum(y_part * y_part)
        tl.store(norm + row, tl.sqrt(squares) * row_scale * largest)
    places = out + row * out_stride
    small = within(x * (1.0 / row_scale), largest)
    tl.store(places + at, small.to(out.dtype.element_ty), mask=inside)
    small = within(y * (1.0 / row_scale), largest)
    tl.store(places + third + rank, small.to(out.dtype.element_ty), mask=rank < ranks)


@triton.jit(do_not_specialize=["rows"])
def _fill_ranks(
    h, h_stride, factor, scale, out, out_stride, rows, ranks, largest,
    HEIGHT: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)).to(tl.int64)[:, None]
    rank = tl.arange(0, RANKS)[None, :]
    inside = (row < rows) & (rank < ranks)
    found = tl.load(h + row * h_stride + rank, mask=inside, other=0.0).to(tl.float32)
    by = tl.load(factor) / tl.load(scale + row, mask=row < rows, other=1.0)
    small = within(found * by, largest)
    tl.store(out + row * out_stride + rank, small.to(out.dtype.element_ty), mask=inside)
