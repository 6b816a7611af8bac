"""Triton kernels that add up float32 parts of thin products, always in the same order."""

import torch
import triton
import triton.language as tl

from sftlab.fastpath.ceil_div import ceil_div

# parts that a program adds up at once, and the columns of its rows in all
AT_ONCE, COLUMNS = 8, 512


def add_up(parts: torch.Tensor, rank: int, out: torch.Tensor) -> None:
    """Fill `out` [rows, columns] with the sum of `parts` [count, rows, padded], then zeros.

    `rank` columns of each part are used.
    """
    (rows, columns), height = out.shape, COLUMNS // parts.shape[2]
    _add_up[(ceil_div(rows, height),)](
        parts, len(parts), out, out.stride(0), rows, rank, columns, parts.shape[2],
        triton.next_power_of_2(columns), height, AT_ONCE,
    )  # fmt: skip


def add_up_all(
    part_rows: torch.Tensor,
    part_columns: torch.Tensor,
    splits: int,
    used: tuple[int, int],
    into_h: torch.Tensor,
    into_b: torch.Tensor,
    into_a: torch.Tensor,
) -> None:
    """Fill `into_h` [rows, ranks], `into_b` [2 size, ranks] and `into_a` [ranks, size].

    They come of parts that gated_lora_kernel.py's backward has stored: `part_rows` [groups, rows,
    2 padded], and in `part_columns` [splits, 2 size, padded] for `into_b`, then [splits, size,
    padded] for `into_a`, transposed. `used` are the columns of gate or up, and those of down.
    """
    (groups, rows, pairs), (ranks, size) = part_rows.shape, into_a.shape
    height = COLUMNS // pairs
    programs = sum(ceil_div(n, height) for n in (rows, 2 * size, size))
    _add_up_all[(programs,)](
        part_rows, part_columns, into_h, into_h.stride(0), into_b, into_a, rows, size, *used,
        groups, splits, into_b.shape[1], ranks, pairs // 2,
        *(triton.next_power_of_2(n) for n in (into_b.shape[1], ranks)), height, AT_ONCE,
    )  # fmt: skip


@triton.jit
def _add_up_block(
    parts, count, out, row_stride, column_stride, block, rows, own, rank, columns,
    PAIRS: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Write the sum of `count` parts, [rows, PAIRS RANK] each, in a block of rows of `out`.

    Of RANK columns the first `rank` are used. After `own` rows they go `rank` columns further to
    the right. The other of the `columns` become 0.
    """
    row = (block * HEIGHT + tl.arange(0, HEIGHT)).to(tl.int64)
    k = tl.arange(0, PAIRS * RANK)
    one = tl.arange(0, AT_ONCE)[:, None, None]
    places = parts + row[None, :, None] * (PAIRS * RANK) + k[None, None, :]
    inside = (row < rows)[None, :, None]
    found = tl.zeros([HEIGHT, PAIRS * RANK], tl.float32)
    for first in range(0, count, AT_ONCE):
        part = first + one
        at = places + part.to(tl.int64) * rows * (PAIRS * RANK)
        found += tl.sum(tl.load(at, mask=inside & (part < count), other=0.0), 0)
    row, k, column = row[:, None], k[None, :], tl.arange(0, COLUMNS)[None, :]
    out += row * row_stride
    begin = row // own * rank
    place = begin + k // RANK * rank + k % RANK
    used = (row < rows) & (k % RANK < rank)
    tl.store(out + place * column_stride, found.to(out.dtype.element_ty), mask=used)
    outside = (column < begin) | (column >= begin + PAIRS * rank)
    zero = tl.zeros([HEIGHT, COLUMNS], out.dtype.element_ty)
    tl.store(out + column * column_stride, zero, mask=(row < rows) & (column < columns) & outside)


@triton.jit(do_not_specialize=["rows"])
def _add_up(
    parts, count, out, stride, rows, rank, columns, RANK: tl.constexpr, COLUMNS: tl.constexpr,
    HEIGHT: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    _add_up_block(
        parts, count, out, stride, 1, tl.program_id(0), rows, rows, rank, columns, 1, RANK,
        COLUMNS, HEIGHT, AT_ONCE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "splits"])
def _add_up_all(
    part_rows, part_columns, into_h, stride, into_b, into_a, rows, size, rank, rank_down, groups,
    splits, ranks, ranks_down, RANK: tl.constexpr, COLUMNS: tl.constexpr,
    COLUMNS_DOWN: tl.constexpr, HEIGHT: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Add up what `backward` wrote: of rows, then of gate's and up's columns, then of act's."""
    block = tl.program_id(0)
    of_rows, of_b = tl.cdiv(rows, HEIGHT), tl.cdiv(2 * size, HEIGHT)
    if block < of_rows:
        _add_up_block(
            part_rows, groups, into_h, stride, 1, block, rows, rows, rank, ranks, 2, RANK,
            COLUMNS, HEIGHT, AT_ONCE,
        )  # fmt: skip
    elif block < of_rows + of_b:
        _add_up_block(
            part_columns, splits, into_b, ranks, 1, block - of_rows, 2 * size, size, rank, ranks,
            1, RANK, COLUMNS, HEIGHT, AT_ONCE,
        )  # fmt: skip
    else:
        part_a = part_columns + splits.to(tl.int64) * 2 * size * RANK
        _add_up_block(
            part_a, splits, into_a, 1, size, block - of_rows - of_b, size, size, rank_down,
            ranks_down, 1, RANK, COLUMNS_DOWN, HEIGHT, AT_ONCE,
        )  # fmt: skip
