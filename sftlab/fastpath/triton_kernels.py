"""Triton kernels: attention over packed rows, and softmax cross-entropy with its gradient.

Attention is FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithms 1 and 2) over a table of
tiles. Every program works on one sequence, short rows waste no blocks, and grouped heads are never
repeated. Tensors are contiguous: queries [tokens, heads, head size], keys and values [tokens, key
heads, head size].
"""

import math

import torch
import triton
import triton.language as tl

from sftlab.data.collator import TILE

LOG2_E = math.log2(math.e)
# Per program: tokens owned (a tile's or half of them), tokens read at a time, warps, stages. These
# were the fastest on an H200 for rows of a few hundred to some thousand tokens: the first two in
# bfloat16, the third in float32, where larger ones spill registers (tests/test_kernels.py).
BY_ROWS, BY_KEYS, FLOAT32 = (TILE, 32, 4, 3), (TILE, TILE, 4, 1), (32, 32, 4, 1)


def attention_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tiles: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention within each sequence.

    Returns the output, shaped like `query`, and the base-2 log-sum-exps [heads, tokens].
    """
    tokens, heads, size = query.shape
    output = torch.empty_like(query)
    lse = torch.empty(heads, tokens, device=query.device, dtype=torch.float32)
    own, read, precision, options = _launch(query, BY_ROWS)
    _forward[(tiles.shape[1] * (TILE // own), heads)](
        query, key, value, output, lse, tiles, scale * LOG2_E, tokens,
        heads, heads // key.shape[1], size, TILE, own, read, precision, **options,
    )  # fmt: skip
    return output, lse


def attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of `query`, `key` and `value`."""
    tokens, heads, size = query.shape
    groups = heads // key.shape[1]
    d_query, d_key, d_value = (
        torch.empty_like(query),
        torch.empty_like(key),
        torch.empty_like(value),
    )
    delta = torch.empty_like(lse)
    shape = (scale, scale * LOG2_E, tokens, heads, groups, size)
    own, read, precision, options = _launch(query, BY_ROWS)
    _backward_query[(tiles.shape[1] * (TILE // own), heads)](
        query, key, value, output, gradient, lse, delta, d_query, tiles[0], *shape,
        TILE, own, read, precision, **options,
    )  # fmt: skip
    own, read, precision, options = _launch(query, BY_KEYS)
    _backward_key[(tiles.shape[1] * (TILE // own), heads // groups)](
        query, key, value, gradient, lse, delta, d_key, d_value, tiles[1], *shape,
        TILE, own, read, precision, **options,
    )  # fmt: skip
    return d_query, d_key, d_value


def softmax_cross_entropy_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    losses: torch.Tensor,
    entropies: torch.Tensor,
    hits: torch.Tensor,
) -> None:
    """Overwrite `logits` [rows, words] with d loss / d logits.

    Fills [rows] each: the losses in nats, the entropies, and hits (1.0 where the target is on top).
    """
    rows, words = logits.shape
    _cross_entropy[(rows,)](
        logits, targets, losses, entropies, hits, words, logits.stride(0), 8192, num_warps=16
    )


def _launch(
    tensor: torch.Tensor, in_16_bits: tuple[int, int, int, int]
) -> tuple[int, int, str, dict[str, int]]:
    """Returns tokens owned and read at a time, the precision of products, and Triton's options.

    A float32 product takes three TF32 products: of the numbers' first 11 bits, and of these with
    the bits that follow. Its error is no larger than a plain one's (tests/test_kernels.py).
    """
    whole = tensor.dtype == torch.float32
    own, read, warps, stages = FLOAT32 if whole else in_16_bits
    return own, read, "tf32x3" if whole else "tf32", {"num_warps": warps, "num_stages": stages}


@triton.jit
def _part(tiles, index, TILE: tl.constexpr, OWN: tl.constexpr):
    tile = tiles + 3 * (index // (TILE // OWN))
    return tl.load(tile), tl.load(tile + 1), tl.load(tile + 2) + OWN * (index % (TILE // OWN))


@triton.jit
def _forward(
    query, key, value, output, lse, tiles, scale_log2, tokens,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    start, end, first = _part(tiles, tl.program_id(0), TILE, ROWS)
    head = tl.program_id(1)
    if first < end:
        KEY_STRIDE: tl.constexpr = HEADS // GROUPS * SIZE
        rows = first + tl.arange(0, ROWS)
        unit = tl.arange(0, SIZE)
        at = rows[:, None] * (HEADS * SIZE) + head * SIZE + unit[None, :]
        real = rows[:, None] < end
        q = tl.load(query + at, mask=real, other=0.0)
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        sums = tl.zeros((ROWS, SIZE), tl.float32)
        offset = (head // GROUPS) * SIZE
        for column in range(start, tl.minimum(first + ROWS, end), COLUMNS):
            columns = column + tl.arange(0, COLUMNS)
            inside = columns < end
            k = tl.load(
                key + columns[None, :] * KEY_STRIDE + offset + unit[:, None],
                mask=inside[None, :],
                other=0.0,
            )
            v = tl.load(
                value + columns[:, None] * KEY_STRIDE + offset + unit[None, :],
                mask=inside[:, None],
                other=0.0,
            )
            scores = tl.dot(q, k, input_precision=PRECISION) * scale_log2
            scores = tl.where(columns[None, :] <= rows[:, None], scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - higher[:, None])
            shrink = tl.exp2(top - higher)
            total = total * shrink + tl.sum(weights, 1)
            sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None], input_precision=PRECISION)
            top = higher
        tl.store(output + at, (sums / total[:, None]).to(output.dtype.element_ty), mask=real)
        tl.store(lse + head * tokens + rows, top + tl.log2(total), mask=rows < end)


@triton.jit
def _backward_query(
    query, key, value, output, gradient, lse, delta, d_query, tiles, scale, scale_log2, tokens,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    start, end, first = _part(tiles, tl.program_id(0), TILE, ROWS)
    head = tl.program_id(1)
    if first < end:
        KEY_STRIDE: tl.constexpr = HEADS // GROUPS * SIZE
        rows = first + tl.arange(0, ROWS)
        unit = tl.arange(0, SIZE)
        at = rows[:, None] * (HEADS * SIZE) + head * SIZE + unit[None, :]
        real = rows[:, None] < end
        q = tl.load(query + at, mask=real, other=0.0)
        dy = tl.load(gradient + at, mask=real, other=0.0)
        y = tl.load(output + at, mask=real, other=0.0)
        log_sum = tl.load(lse + head * tokens + rows, mask=rows < end, other=float("inf"))
        mean = tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1)
        tl.store(delta + head * tokens + rows, mean, mask=rows < end)
        dq = tl.zeros((ROWS, SIZE), tl.float32)
        offset = (head // GROUPS) * SIZE
        for column in range(start, tl.minimum(first + ROWS, end), COLUMNS):
            columns = column + tl.arange(0, COLUMNS)
            inside = columns[:, None] < end
            k = tl.load(
                key + columns[:, None] * KEY_STRIDE + offset + unit[None, :], mask=inside, other=0.0
            )
            v = tl.load(
                value + columns[:, None] * KEY_STRIDE + offset + unit[None, :],
                mask=inside,
                other=0.0,
            )
            weights = tl.exp2(
                tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - log_sum[:, None]
            )
            weights = tl.where(columns[None, :] <= rows[:, None], weights, 0.0)
            d_scores = weights * (
                tl.dot(dy, tl.trans(v), input_precision=PRECISION) - mean[:, None]
            )
            dq = tl.dot(d_scores.to(k.dtype), k, dq, input_precision=PRECISION)
        tl.store(d_query + at, (dq * scale).to(d_query.dtype.element_ty), mask=real)


@triton.jit
def _backward_key(
    query, key, value, gradient, lse, delta, d_key, d_value, tiles, scale, scale_log2, tokens,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    _, end, first = _part(tiles, tl.program_id(0), TILE, COLUMNS)
    key_head = tl.program_id(1)
    if first < end:
        KEY_STRIDE: tl.constexpr = HEADS // GROUPS * SIZE
        columns = first + tl.arange(0, COLUMNS)
        unit = tl.arange(0, SIZE)
        at = columns[:, None] * KEY_STRIDE + key_head * SIZE + unit[None, :]
        real = columns[:, None] < end
        k = tl.load(key + at, mask=real, other=0.0)
        v = tl.load(value + at, mask=real, other=0.0)
        dk = tl.zeros((COLUMNS, SIZE), tl.float32)
        dv = tl.zeros((COLUMNS, SIZE), tl.float32)
        for group in range(GROUPS):
            head = key_head * GROUPS + group
            for row in range(first, end, ROWS):
                rows = row + tl.arange(0, ROWS)
                inside = rows < end
                there = rows[:, None] * (HEADS * SIZE) + head * SIZE + unit[None, :]
                q = tl.load(query + there, mask=inside[:, None], other=0.0)
                dy = tl.load(gradient + there, mask=inside[:, None], other=0.0)
                log_sum = tl.load(lse + head * tokens + rows, mask=inside, other=float("inf"))
                mean = tl.load(delta + head * tokens + rows, mask=inside, other=0.0)
                weights = tl.exp2(
                    tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2
                    - log_sum[None, :]
                )
                weights = tl.where(columns[:, None] <= rows[None, :], weights, 0.0)
                dv = tl.dot(weights.to(dy.dtype), dy, dv, input_precision=PRECISION)
                d_scores = weights * (
                    tl.dot(v, tl.trans(dy), input_precision=PRECISION) - mean[None, :]
                )
                dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision=PRECISION)
        tl.store(d_key + at, (dk * scale).to(d_key.dtype.element_ty), mask=real)
        tl.store(d_value + at, dv.to(d_value.dtype.element_ty), mask=real)


@triton.jit
def _cross_entropy(logits, targets, losses, entropies, hits, words, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    block = tl.arange(0, BLOCK)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    weighted = tl.zeros((), tl.float32)
    for start in range(0, words, BLOCK):
        inside = start + block < words
        x = tl.load(logits + start + block, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        weights = tl.exp(x - higher)
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(weights, 0)
        weighted = weighted * shrink + tl.sum(tl.where(inside, weights * x, 0.0), 0)
        top = higher
    log_sum = top + tl.log(total)
    aimed = tl.load(logits + target).to(tl.float32)
    tl.store(losses + row, log_sum - aimed)
    tl.store(entropies + row, log_sum - weighted / total)
    tl.store(hits + row, (aimed >= top).to(tl.float32))
    for start in range(0, words, BLOCK):
        inside = start + block < words
        x = tl.load(logits + start + block, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.exp(x - log_sum) - tl.where(start + block == target, 1.0, 0.0)
        tl.store(logits + start + block, gradient.to(logits.dtype.element_ty), mask=inside)
