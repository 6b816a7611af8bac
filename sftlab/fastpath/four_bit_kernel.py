"""A Triton kernel that gives 4-bit weights back, with the scales of their scales, in one pass.

It computes what bitsandbytes computes in three: a block's scale is code[rounded] * larger scale +
offset where scales are nested, a weight is table[4 bits] * scale. All of it is in float32, in this
order, every operation rounded by itself (no fused multiply-add), and a weight is rounded once more,
to the nearest number of `out`'s dtype. So weights are equal to bitsandbytes' to the last bit.
Triton's interpreter cuts bfloat16 off instead of rounding it: there, bits are equal in float32 and
float16 alone. It cuts float8 off too.

In float8 a weight is divided by the scale of the whole matrix first, and rounded after that. The
backward reads the matrix transposed: that form goes through it by tiles, so that both what it reads
and what it writes lies together.
"""

import torch
import triton
import triton.language as tl

from sftlab.fastpath.ceil_div import ceil_div

# weights of four bits that a word of 32 bits holds: a program reads words and writes 16 bytes each
A_WORD = 8
# blocks whose scales share one larger scale: bitsandbytes knows no other number
NESTED_BLOCK = 256
# words of a program, and warps
FORM = (512, 4)
# rows of a tile that is transposed, words of each, and warps
TILE = (128, 16, 8)


def fill_four_bit_weight(
    packed: torch.Tensor,
    scales: torch.Tensor,
    nested: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    table: torch.Tensor,
    block: int,
    out: torch.Tensor,
    form: tuple = FORM,
) -> None:
    """Fill `out` [rows, columns] with the weights that `packed` holds, two a byte.

    `block` weights share one of `scales` [blocks], float32. With `nested` these are bytes: it holds
    the 256 numbers that they stand for, a larger scale [blocks / 256] for each 256 of them, and
    what is added, all float32. `table` are the 16 numbers that four bits stand for, float32.
    All tensors are contiguous, but for gaps between the rows of `out` where its columns are a
    multiple of 8. The number of weights is a multiple of 8, and so is `block`; `packed` begins at a
    multiple of 4 bytes.
    """
    words, (width, warps) = out.numel() // A_WORD, form
    code, larger, offset = nested or (scales, scales, scales)
    gaps = not out.is_contiguous()
    row, stride = (out.shape[1] // A_WORD, out.stride(0)) if gaps else (1, 0)
    _weights[(ceil_div(words, width),)](
        packed, scales, code, larger, offset, table, out, words, block // A_WORD,
        nested is not None, NESTED_BLOCK, A_WORD, gaps, row, stride, width,
        num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip


def fill_four_bit_float8(
    packed: torch.Tensor,
    scales: torch.Tensor,
    nested: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    table: torch.Tensor,
    block: int,
    scale: torch.Tensor,
    transposed: bool,
    out: torch.Tensor,
    form: tuple | None = None,
) -> None:
    """Fill `out` with weights divided by `scale`, a power of two in its first place.

    `out` is [rows, columns], or [columns, rows] where `transposed`, and contiguous. Its columns and
    its rows are multiples of 8. What comes before is as fill_four_bit_weight takes it.
    """
    words = out.numel() // A_WORD
    code, larger, offset = nested or (scales, scales, scales)
    if transposed:
        (columns, rows), (high, wide, warps) = out.shape, form or TILE
        row = columns // A_WORD
        programs = ceil_div(rows, high) * ceil_div(row, wide)
    else:
        (rows, row), (wide, warps), high = (1, words), form or FORM, 1
        programs = ceil_div(words, wide)
    _float8_weights[(programs,)](
        packed, scales, code, larger, offset, table, scale, out, rows, row, block // A_WORD,
        nested is not None, NESTED_BLOCK, A_WORD, transposed, high, wide,
        num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _weights(
    packed, scales, code, larger, offset, table, out, words,
    WORDS_A_BLOCK: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr,
    A_WORD: tl.constexpr, GAPS: tl.constexpr, ROW: tl.constexpr, STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = at < words
    found = _of_words(
        packed, scales, code, larger, offset, table, at, inside, WORDS_A_BLOCK, NESTED,
        NESTED_BLOCK, A_WORD,
    )  # fmt: skip
    place = tl.arange(0, A_WORD)[None, :]
    places = at.to(tl.int64)[:, None] * A_WORD
    if GAPS:
        places = (at // ROW).to(tl.int64)[:, None] * STRIDE + (at % ROW)[:, None] * A_WORD
    places = out + places + place
    tl.store(places, found.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _float8_weights(
    packed, scales, code, larger, offset, table, scale, out, rows, row_words,
    WORDS_A_BLOCK: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr,
    A_WORD: tl.constexpr, TRANSPOSED: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program has a tile of HIGH rows, and of each WIDE words."""
    tile, across = tl.program_id(0), tl.cdiv(row_words, WIDE)
    top, left = tile // across * HIGH, tile % across * WIDE
    within = tl.arange(0, HIGH * WIDE)
    row, word = top + within // WIDE, left + within % WIDE
    inside = (row < rows) & (word < row_words)
    found = _of_words(
        packed, scales, code, larger, offset, table, row * row_words + word, inside, WORDS_A_BLOCK,
        NESTED, NESTED_BLOCK, A_WORD,
    )  # fmt: skip
    # a power of two: one over it is exact, and so is the product
    found = (found * tl.div_rn(1.0, tl.load(scale))).to(out.dtype.element_ty)
    if TRANSPOSED:
        found = tl.trans(tl.reshape(found, (HIGH, WIDE * A_WORD)))
        column = left * A_WORD + tl.arange(0, WIDE * A_WORD)[:, None]
        row = top + tl.arange(0, HIGH)[None, :]
        inside = (row < rows) & (column < row_words * A_WORD)
        tl.store(out + column.to(tl.int64) * rows + row, found, mask=inside)
    else:
        places = word.to(tl.int64)[:, None] * A_WORD + tl.arange(0, A_WORD)[None, :]
        tl.store(out + places, found, mask=inside[:, None])


@triton.jit
def _of_words(
    packed, scales, code, larger, offset, table, at, inside,
    WORDS_A_BLOCK: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr,
    A_WORD: tl.constexpr,
):  # fmt: skip
    """Returns the weights of the words `at`, [words, A_WORD] in float32."""
    word = tl.load(packed.to(tl.pointer_type(tl.int32), bitcast=True) + at, mask=inside, other=0)
    block = at // WORDS_A_BLOCK
    scale = tl.load(scales + block, mask=inside, other=0)
    if NESTED:
        scale = tl.load(code + scale.to(tl.int32)) * tl.load(
            larger + block // NESTED_BLOCK, mask=inside, other=0.0
        )
        scale += tl.load(offset)
    # the upper half of a byte is the weight before that of its lower half
    place = tl.arange(0, A_WORD)[None, :]
    four_bits = (word[:, None] >> (place ^ 1) * 4) & 15
    return tl.load(table + four_bits) * scale[:, None]
