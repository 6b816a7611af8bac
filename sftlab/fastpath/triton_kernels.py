"""Triton kernels: attention over packed rows, with its gradients.

It is FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithms 1 and 2) over a table of tiles. Every
program works on one sequence, short rows waste no blocks, and grouped heads are never repeated.
Tensors are contiguous: queries [tokens, heads, head size], keys [tokens, key heads, head size],
values [tokens, key heads, value size]. Heads have up to 256 elements. What only some families have
(windows, caps, sinks, sizes that are no power of two) is left out at compile time for the others.
"""

import math

import torch
import triton
import triton.language as tl

from sftlab.data.tiles import LONG_ROW, LONG_TILE, TILE, tile_of

LOG2_E = math.log2(math.e)
# Per program: tokens owned (of a tile), tokens read at a time, warps, stages. These were the
# fastest on an H200 for rows of some hundred tokens: the first two in bfloat16, the third in
# float32, where larger ones spill registers (tests/test_kernels.py).
BY_ROWS, BY_KEYS, FLOAT32 = (TILE, 32, 4, 3), (TILE, TILE, 4, 1), (32, 32, 4, 1)
# The same for heads wider than 128. They spill least, compiled without a GPU.
WIDE_ROWS, WIDE_KEYS, WIDE_FLOAT32 = (TILE, 32, 8, 2), (32, 32, 8, 1), (16, 16, 4, 1)
# The same in bfloat16 for long tiles, the fastest on an H200 for rows of some thousand tokens: for
# heads of 65 to 128 elements, which need more shared memory than other GPUs have, and for smaller
# ones.
LONG_ROWS, LONG_KEYS = (LONG_TILE, TILE, 8, 3), (LONG_TILE, TILE, 8, 1)
SMALL_LONG_ROWS = (TILE, TILE, 4, 3)


def attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention within each sequence of `tiles` (sftlab/data/tiles.py).

    With a `window`, a token sees the last `window` ones, itself included. A `cap` bounds scores by
    tanh. `sinks` [heads] are scores that take weight and have no value.

    Returns the output [tokens, heads, value size], and the base-2 log-sum-exps [heads, tokens],
    with the sinks.
    """
    tokens, heads, _ = query.shape
    output = query.new_empty(tokens, heads, value.shape[-1])
    lse = torch.empty(heads, tokens, device=query.device, dtype=torch.float32)
    own, read, precision, options = _launch(query, value, tiles, window)
    _forward[(_programs(tiles, own), heads)](
        query, key, value, output, lse, tiles, lse if sinks is None else sinks, scale * LOG2_E,
        cap * LOG2_E, tokens, heads, heads // key.shape[1], *_sizes(query, value), window, cap > 0,
        sinks is not None, TILE, own, read, precision, **options,
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
    window: int = 0,
    cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of `query`, `key` and `value`. Sinks are frozen, and in `lse`."""
    tokens, heads, _ = query.shape
    groups = heads // key.shape[1]
    d_query, d_key, d_value = (
        torch.empty_like(query),
        torch.empty_like(key),
        torch.empty_like(value),
    )
    delta = torch.empty_like(lse)
    shape = (
        *(scale, scale * LOG2_E, cap * LOG2_E, tokens, heads, groups),
        *(*_sizes(query, value), window, cap > 0),
    )
    own, read, precision, options = _launch(query, value, tiles, window)
    _backward_query[(_programs(tiles, own), heads)](
        query, key, value, output, gradient, lse, delta, d_query, tiles[0], *shape,
        TILE, own, read, precision, **options,
    )  # fmt: skip
    own, read, precision, options = _launch(query, value, tiles, window, by_keys=True)
    _backward_key[(_programs(tiles, own), heads // groups)](
        query, key, value, gradient, lse, delta, d_key, d_value, tiles[1], *shape,
        TILE, own, read, precision, **options,
    )  # fmt: skip
    return d_query, d_key, d_value


def _sizes(query: torch.Tensor, value: torch.Tensor) -> tuple[int, int, int, int]:
    """Returns head sizes of queries and values, and the powers of two that hold them."""
    sizes = query.shape[-1], value.shape[-1]
    return *sizes, *(max(16, triton.next_power_of_2(size)) for size in sizes)


def _programs(tiles: torch.Tensor, own: int) -> int:
    return tiles.shape[1] * (tile_of(tiles) // own)


def _launch(
    query: torch.Tensor,
    value: torch.Tensor,
    tiles: torch.Tensor,
    window: int,
    by_keys: bool = False,
) -> tuple[int, int, str, dict[str, int]]:
    """Returns tokens owned and read at a time, the precision of products, and Triton's options.

    A float32 product takes three TF32 products: of the numbers' first 11 bits, and of these with
    the bits that follow. Its error is no larger than a plain one's (tests/test_kernels.py).
    """
    whole, size = query.dtype == torch.float32, query.shape[-1]
    # in a window rows are as good as short
    short = tile_of(tiles) < LONG_TILE or 0 < window < LONG_ROW
    if whole:
        chosen = FLOAT32 if size <= 128 else WIDE_FLOAT32
    elif size > 128:
        chosen = WIDE_KEYS if by_keys else WIDE_ROWS
    elif short or value.shape[-1] > 128:
        chosen = BY_KEYS if by_keys else BY_ROWS
    elif size <= 64:
        chosen = BY_KEYS if by_keys else SMALL_LONG_ROWS
    elif _has_room(query.device):
        chosen = LONG_KEYS if by_keys else LONG_ROWS
    else:
        chosen = BY_KEYS if by_keys else BY_ROWS
    own, read, warps, stages = chosen
    return own, read, "tf32x3" if whole else "tf32", {"num_warps": warps, "num_stages": stages}


def _has_room(device: torch.device) -> bool:
    # long tiles have been measured on Hopper alone; the interpreter has room for them
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


@triton.jit
def _own(tiles, index, TILE: tl.constexpr, OWN: tl.constexpr):
    # a program owns several parts of a tile, or one, or a piece of one
    part = tiles + 3 * (index * OWN // TILE)
    return tl.load(part), tl.load(part + 1), tl.load(part + 2) + index * OWN % TILE


@triton.jit
def _within(inside, unit, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    # a head that fills its block needs no mask of its own
    if SIZE < BLOCK:
        inside = inside & (unit < SIZE)
    return inside


@triton.jit
def _seen(rows, columns, WINDOW: tl.constexpr):
    seen = columns <= rows
    if WINDOW > 0:
        seen = seen & (rows - columns < WINDOW)
    return seen


@triton.jit
def _first_seen(start, first, WINDOW: tl.constexpr, COLUMNS: tl.constexpr):
    # whole tiles before the window are left out
    if WINDOW > 0:
        start += tl.maximum(first - WINDOW + 1 - start, 0) // COLUMNS * COLUMNS
    return start


@triton.jit
def _masked_from(start, first, WINDOW: tl.constexpr, COLUMNS: tl.constexpr):
    # whole tiles before the rows' own are seen by all of them
    if WINDOW > 0:
        return start
    else:
        return start + (first - start) // COLUMNS * COLUMNS


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _forward(
    query, key, value, output, lse, tiles, sinks, scale_log2, cap, tokens,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, VALUE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    SINKS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    start, end, first = _own(tiles, tl.program_id(0), TILE, ROWS)
    head = tl.program_id(1)
    if first < end:
        KEY_HEADS: tl.constexpr = HEADS // GROUPS
        rows = first + tl.arange(0, ROWS)
        unit, unit_v = tl.arange(0, BLOCK), tl.arange(0, BLOCK_V)
        at = rows[:, None] * (HEADS * SIZE) + head * SIZE + unit[None, :]
        at_v = rows[:, None] * (HEADS * VALUE) + head * VALUE + unit_v[None, :]
        real = rows[:, None] < end
        q = tl.load(query + at, mask=_within(real, unit[None, :], SIZE, BLOCK), other=0.0)
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        sums = tl.zeros((ROWS, BLOCK_V), tl.float32)
        offset, offset_v = (head // GROUPS) * SIZE, (head // GROUPS) * VALUE
        start = _first_seen(start, first, WINDOW, COLUMNS)
        edge = _masked_from(start, first, WINDOW, COLUMNS)
        for MASKED in tl.static_range(2):
            from_here, to_here = start, edge
            if MASKED:
                from_here, to_here = edge, tl.minimum(first + ROWS, end)
            for column in range(from_here, to_here, COLUMNS):
                columns = column + tl.arange(0, COLUMNS)
                inside = (columns < end) | (MASKED == 0)
                k = tl.load(
                    key + columns[None, :] * (KEY_HEADS * SIZE) + offset + unit[:, None],
                    mask=_within(inside[None, :], unit[:, None], SIZE, BLOCK),
                    other=0.0,
                )
                v = tl.load(
                    value + columns[:, None] * (KEY_HEADS * VALUE) + offset_v + unit_v[None, :],
                    mask=_within(inside[:, None], unit_v[None, :], VALUE, BLOCK_V),
                    other=0.0,
                )
                scores = tl.dot(q, k, input_precision=PRECISION) * scale_log2
                if CAPPED:
                    scores = cap * _tanh(scores / cap)
                if MASKED:
                    seen = _seen(rows[:, None], columns[None, :], WINDOW)
                    scores = tl.where(seen, scores, float("-inf"))
                higher = tl.maximum(top, tl.max(scores, 1))
                finite = higher
                if WINDOW > 0:  # a row may see nothing of a tile
                    finite = tl.where(higher == float("-inf"), 0.0, higher)
                weights = tl.exp2(scores - finite[:, None])
                shrink = tl.exp2(top - finite)
                total = total * shrink + tl.sum(weights, 1)
                sums = sums * shrink[:, None]
                sums = tl.dot(weights.to(v.dtype), v, sums, input_precision=PRECISION)
                top = higher
        if SINKS:
            total += tl.exp2(tl.load(sinks + head).to(tl.float32) * 1.4426950408889634 - top)
        real_v = _within(real, unit_v[None, :], VALUE, BLOCK_V)
        tl.store(output + at_v, (sums / total[:, None]).to(output.dtype.element_ty), mask=real_v)
        tl.store(lse + head * tokens + rows, top + tl.log2(total), mask=rows < end)


@triton.jit
def _backward_query(
    query, key, value, output, gradient, lse, delta, d_query, tiles, scale, scale_log2, cap, tokens,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, VALUE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    start, end, first = _own(tiles, tl.program_id(0), TILE, ROWS)
    head = tl.program_id(1)
    if first < end:
        KEY_HEADS: tl.constexpr = HEADS // GROUPS
        rows = first + tl.arange(0, ROWS)
        unit, unit_v = tl.arange(0, BLOCK), tl.arange(0, BLOCK_V)
        at = rows[:, None] * (HEADS * SIZE) + head * SIZE + unit[None, :]
        at_v = rows[:, None] * (HEADS * VALUE) + head * VALUE + unit_v[None, :]
        real = _within(rows[:, None] < end, unit[None, :], SIZE, BLOCK)
        real_v = _within(rows[:, None] < end, unit_v[None, :], VALUE, BLOCK_V)
        q = tl.load(query + at, mask=real, other=0.0)
        dy = tl.load(gradient + at_v, mask=real_v, other=0.0)
        y = tl.load(output + at_v, mask=real_v, other=0.0)
        log_sum = tl.load(lse + head * tokens + rows, mask=rows < end, other=float("inf"))
        mean = tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1)
        tl.store(delta + head * tokens + rows, mean, mask=rows < end)
        dq = tl.zeros((ROWS, BLOCK), tl.float32)
        offset, offset_v = (head // GROUPS) * SIZE, (head // GROUPS) * VALUE
        start = _first_seen(start, first, WINDOW, COLUMNS)
        edge = _masked_from(start, first, WINDOW, COLUMNS)
        for MASKED in tl.static_range(2):
            from_here, to_here = start, edge
            if MASKED:
                from_here, to_here = edge, tl.minimum(first + ROWS, end)
            for column in range(from_here, to_here, COLUMNS):
                columns = column + tl.arange(0, COLUMNS)
                inside = (columns[:, None] < end) | (MASKED == 0)
                k = tl.load(
                    key + columns[:, None] * (KEY_HEADS * SIZE) + offset + unit[None, :],
                    mask=_within(inside, unit[None, :], SIZE, BLOCK),
                    other=0.0,
                )
                v = tl.load(
                    value + columns[:, None] * (KEY_HEADS * VALUE) + offset_v + unit_v[None, :],
                    mask=_within(inside, unit_v[None, :], VALUE, BLOCK_V),
                    other=0.0,
                )
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
                if CAPPED:
                    bent = _tanh(scores / cap)
                    scores = cap * bent
                weights = tl.exp2(scores - log_sum[:, None])
                if MASKED:
                    seen = _seen(rows[:, None], columns[None, :], WINDOW)
                    weights = tl.where(seen, weights, 0.0)
                d_scores = weights * (
                    tl.dot(dy, tl.trans(v), input_precision=PRECISION) - mean[:, None]
                )
                if CAPPED:
                    d_scores *= 1.0 - bent * bent
                dq = tl.dot(d_scores.to(k.dtype), k, dq, input_precision=PRECISION)
        tl.store(d_query + at, (dq * scale).to(d_query.dtype.element_ty), mask=real)


@triton.jit
def _backward_key(
    query, key, value, gradient, lse, delta, d_key, d_value, tiles, scale, scale_log2, cap, tokens,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, VALUE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    _, end, first = _own(tiles, tl.program_id(0), TILE, COLUMNS)
    key_head = tl.program_id(1)
    if first < end:
        KEY_HEADS: tl.constexpr = HEADS // GROUPS
        columns = first + tl.arange(0, COLUMNS)
        unit, unit_v = tl.arange(0, BLOCK), tl.arange(0, BLOCK_V)
        at = columns[:, None] * (KEY_HEADS * SIZE) + key_head * SIZE + unit[None, :]
        at_v = columns[:, None] * (KEY_HEADS * VALUE) + key_head * VALUE + unit_v[None, :]
        real = _within(columns[:, None] < end, unit[None, :], SIZE, BLOCK)
        real_v = _within(columns[:, None] < end, unit_v[None, :], VALUE, BLOCK_V)
        k = tl.load(key + at, mask=real, other=0.0)
        v = tl.load(value + at_v, mask=real_v, other=0.0)
        dk = tl.zeros((COLUMNS, BLOCK), tl.float32)
        dv = tl.zeros((COLUMNS, BLOCK_V), tl.float32)
        # whole tiles behind the keys' own see all of them
        last, edge = end, tl.minimum(first + tl.cdiv(COLUMNS, ROWS) * ROWS, end)
        if WINDOW > 0:  # no row behind the window sees these keys
            last = tl.minimum(end, first + COLUMNS + WINDOW - 1)
            edge = last
        for group in range(GROUPS):
            head = key_head * GROUPS + group
            for BEHIND in tl.static_range(2):
                from_here, to_here = first, edge
                if BEHIND:
                    from_here, to_here = edge, last
                for row in range(from_here, to_here, ROWS):
                    rows = row + tl.arange(0, ROWS)
                    inside = rows < end
                    there = rows[:, None] * (HEADS * SIZE) + head * SIZE + unit[None, :]
                    there_v = rows[:, None] * (HEADS * VALUE) + head * VALUE + unit_v[None, :]
                    q = tl.load(
                        query + there,
                        mask=_within(inside[:, None], unit[None, :], SIZE, BLOCK),
                        other=0.0,
                    )
                    dy = tl.load(
                        gradient + there_v,
                        mask=_within(inside[:, None], unit_v[None, :], VALUE, BLOCK_V),
                        other=0.0,
                    )
                    log_sum = tl.load(lse + head * tokens + rows, mask=inside, other=float("inf"))
                    mean = tl.load(delta + head * tokens + rows, mask=inside, other=0.0)
                    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2
                    if CAPPED:
                        bent = _tanh(scores / cap)
                        scores = cap * bent
                    weights = tl.exp2(scores - log_sum[None, :])
                    if not BEHIND:
                        seen = _seen(rows[None, :], columns[:, None], WINDOW)
                        weights = tl.where(seen, weights, 0.0)
                    dv = tl.dot(weights.to(dy.dtype), dy, dv, input_precision=PRECISION)
                    d_scores = weights * (
                        tl.dot(v, tl.trans(dy), input_precision=PRECISION) - mean[None, :]
                    )
                    if CAPPED:
                        d_scores *= 1.0 - bent * bent
                    dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision=PRECISION)
        tl.store(d_key + at, (dk * scale).to(d_key.dtype.element_ty), mask=real)
        tl.store(d_value + at_v, dv.to(d_value.dtype.element_ty), mask=real_v)
