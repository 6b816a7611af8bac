"""A Triton kernel that copies many matrices of one shape, to and from wherever each of them is."""

import torch
import triton
import triton.language as tl

from sftlab.fastpath.ceil_div import ceil_div

# elements of a matrix that a program copies, in whole rows or parts of one
ELEMENTS = 4096
TYPES = {
    torch.uint8: tl.uint8,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}


def copy_many(
    to: torch.Tensor,
    out: torch.Tensor,
    given: torch.Tensor,
    matrix: torch.Tensor,
    count: int,
    apart: int,
    factor: float,
) -> None:
    """Fill `count` matrices like `out` [rows, columns], at the addresses `to`, times `factor`.

    Sources are like `matrix`: at the addresses `given`, or in `given` itself, `apart` elements from
    one another.
    """
    (rows, columns), row_strides = out.shape, (out.stride(0), matrix.stride(0))
    width = min(triton.next_power_of_2(columns), ELEMENTS)
    height = ELEMENTS // width
    across, down = ceil_div(columns, width), ceil_div(rows, height)
    _copy[(count * across * down,)](
        to, given, apart, *row_strides, out.stride(1), matrix.stride(1), rows, columns, factor,
        across, down, TYPES[out.dtype], TYPES[matrix.dtype], apart > 0, height, width,
    )  # fmt: skip


@triton.jit(do_not_specialize=["factor"])
def _copy(
    to, given, apart, to_stride, from_stride, to_step, from_step, rows, columns, factor, across,
    down, TO: tl.constexpr, FROM: tl.constexpr, STACKED: tl.constexpr, HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % (across * down)
    which = (tl.program_id(0) // (across * down)).to(tl.int64)
    out = tl.load(to + which).to(tl.pointer_type(TO))
    if STACKED:
        source = given + which * apart
    else:
        source = tl.load(given + which).to(tl.pointer_type(FROM))
    row = (part // across * HEIGHT + tl.arange(0, HEIGHT)).to(tl.int64)[:, None]
    column = (part % across * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)[None, :]
    inside = (row < rows) & (column < columns)
    found = tl.load(source + row * from_stride + column * from_step, mask=inside)
    if FROM != TO or not STACKED:
        found = (found.to(tl.float32) * factor).to(TO)
    tl.store(out + row * to_stride + column * to_step, found, mask=inside)
