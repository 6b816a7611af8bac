"""Triton kernels of LoRA's dropout: its random bits, and the products with LoRA's A under them.

A program reads the bits of a tile and the tile itself, so that no dropped copy of the input is
written. Programs of the layers that share an input stand beside one another: the tile comes from
the cache for all but one.
"""

import torch
import triton
import triton.language as tl

from sftlab.fastpath.ceil_div import ceil_div

# the fewest rounds of Philox4x32 that pass every test of randomness (Salmon et al. 2011)
ROUNDS = tl.constexpr(7)
# into how many parts the sum over all rows is cut
PARTS = 16
# rows of a tile; it has as many bytes in any dtype
ROWS = 64


def fill_with_bits(out: torch.Tensor, seed: torch.Tensor, threshold: int) -> None:
    """Fill uint8 `out` with bits that are 0 with probability `threshold` / 2^16."""
    count, block = out.numel(), 1024
    _fill[(ceil_div(count, block),)](out, seed, count, threshold, block)


@triton.jit
def _fill(out, seed, count, threshold, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    one, two, three, four = tl.randint4x(tl.load(seed), at, n_rounds=ROUNDS)
    bits = _decide(one, threshold)
    bits += _decide(two, threshold) << 2
    bits += _decide(three, threshold) << 4
    bits += _decide(four, threshold) << 6
    tl.store(out + at, bits.to(tl.uint8), mask=at < count)


@triton.jit
def _decide(number, threshold):
    low = (number & 0xFFFF) >= threshold
    high = ((number >> 16) & 0xFFFF) >= threshold
    return low.to(tl.int32) + high.to(tl.int32) * 2


def project(
    x: torch.Tensor,
    a: torch.Tensor,
    bits: torch.Tensor,
    rank: int,
    factor: float,
    out: torch.Tensor,
) -> None:
    """Fill columns of `out` [rows, ...] with `factor` x A^T, for each layer under its own bits.

    x is [rows, in], `a` has `rank` rows for each layer, bits are [layers, rows, in / 8]. x, `a` and
    `out` may be parts of wider matrices.
    """
    layers, rows = bits.shape[:2]
    _project[(ceil_div(rows, ROWS) * layers,)](
        x, x.stride(0), a, a.stride(0), bits, out, out.stride(0), rows, x.shape[1], factor,
        rank, _block(rank), layers, ROWS, _columns(x), num_warps=4, num_stages=3,
    )  # fmt: skip


@triton.jit
def _project(
    x, x_stride, a, a_stride, bits, out, out_stride, rows, columns, factor,
    RANK: tl.constexpr, RANKS: tl.constexpr, LAYERS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(0) % LAYERS
    row = tl.program_id(0) // LAYERS * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column, of_rank = tl.arange(0, COLUMNS), tl.arange(0, RANKS)
    bits += layer.to(tl.int64) * rows * (columns // 8)
    a += layer * RANK * a_stride
    total = tl.zeros((ROWS, RANKS), tl.float32)
    for start in range(0, columns, COLUMNS):
        at = start + column
        tile = _tile(x, x_stride, bits, row, start, rows, columns, COLUMNS)
        known = (of_rank[None, :] < RANK) & (at[:, None] < columns)
        part = tl.load(a + of_rank[None, :] * a_stride + at[:, None], mask=known, other=0.0)
        total = tl.dot(tile, part, total, input_precision="ieee")
    places = out + row[:, None] * out_stride + layer * RANK + of_rank[None, :]
    inside = (row[:, None] < rows) & (of_rank[None, :] < RANK)
    tl.store(places, (total * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _tile(x, x_stride, bits, row, first, rows, columns, COLUMNS: tl.constexpr):
    at = first + tl.arange(0, COLUMNS)
    inside = (row[:, None] < rows) & (at[None, :] < columns)
    tile = tl.load(x + row[:, None] * x_stride + at[None, :], mask=inside, other=0.0)
    byte = first // 8 + tl.arange(0, COLUMNS // 8)
    inside = (row[:, None] < rows) & (byte[None, :] < columns // 8)
    eight = tl.load(bits + row[:, None] * (columns // 8) + byte[None, :], mask=inside, other=0)
    kept = (eight[:, :, None] >> tl.arange(0, 8).to(tl.uint8)[None, None, :]) & 1
    return tl.where(tl.reshape(kept, (tile.shape[0], COLUMNS)) != 0, tile, 0.0)


def project_transposed(
    gradient: torch.Tensor, x: torch.Tensor, bits: torch.Tensor, rank: int
) -> torch.Tensor:
    """Returns the gradient of A [layers x rank, in] in float32, from that of `project`'s output."""
    layers, rows = bits.shape[:2]
    columns = x.shape[1]
    parts = torch.empty(PARTS, layers * rank, columns, dtype=torch.float32, device=x.device)
    _project_transposed[(ceil_div(columns, _columns(x)) * layers, PARTS)](
        gradient, gradient.stride(0), x, x.stride(0), bits, parts, rows, columns,
        ceil_div(ceil_div(rows, PARTS), ROWS) * ROWS,
        rank, _block(rank), layers, ROWS, _columns(x), num_warps=4, num_stages=3,
    )  # fmt: skip
    return parts.sum(0)


@triton.jit
def _project_transposed(
    gradient, gradient_stride, x, x_stride, bits, parts, rows, columns, part_rows,
    RANK: tl.constexpr, RANKS: tl.constexpr, LAYERS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    layer, part = tl.program_id(0) % LAYERS, tl.program_id(1)
    first_column = tl.program_id(0) // LAYERS * COLUMNS
    at = first_column + tl.arange(0, COLUMNS)
    of_rank = tl.arange(0, RANKS)
    bits += layer.to(tl.int64) * rows * (columns // 8)
    total = tl.zeros((RANKS, COLUMNS), tl.float32)
    first = part * part_rows
    for start in range(first, tl.minimum(first + part_rows, rows), ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        tile = _tile(x, x_stride, bits, row, first_column, rows, columns, COLUMNS)
        known = (of_rank[:, None] < RANK) & (row[None, :] < rows)
        places = gradient + row[None, :] * gradient_stride + layer * RANK + of_rank[:, None]
        total = tl.dot(tl.load(places, mask=known, other=0.0), tile, total, input_precision="ieee")
    places = parts + ((part * LAYERS + layer).to(tl.int64) * RANK + of_rank[:, None]) * columns
    inside = (of_rank[:, None] < RANK) & (at[None, :] < columns)
    tl.store(places + at[None, :], total, mask=inside)


def _columns(x: torch.Tensor) -> int:
    return 256 // x.element_size()


def _block(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))
