"""Hopper kernels of a gated activation that form LoRA's thin products while its tiles are on chip.

They are in Gluon. The tensor memory accelerator (TMA) brings tiles of [rows, columns] into shared
memory. Threads overwrite them there with what the activation or its gradient makes of them. The
tensor cores read them for the thin products, and TMA stores them; gradients in float8 are stored by
the threads that make them. gated_lora_kernel.py launches them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

synchronize = getattr(gl, "barrier", None) or gl.thread_barrier  # Triton 3.7's name, and 3.6's


@gluon.jit
def _share(x, GELU: gl.constexpr):
    """The share of x that the activation lets through: see mlp_kernel.py. exp2 takes log2(e)."""
    if GELU:
        power = gl.exp2(x * (-2.302208198144325 - 0.1029432395800235 * x * x))
    else:
        power = gl.exp2(x * -1.4426950408889634)
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _load_forward(
    gate, up, a, s_gate, s_up, s_a, arrived, step, row, first_column, wanted,
    RANK: gl.constexpr, HEIGHT: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Let TMA fetch the tiles of a step."""
    stage, column = step % STAGES, first_column + step * WIDTH
    bar = arrived.index(stage)
    mbarrier.expect(bar, 2 * (2 * HEIGHT + RANK) * WIDTH, pred=wanted)
    tma.async_copy_global_to_shared(gate, [row, column], bar, s_gate.index(stage), pred=wanted)
    tma.async_copy_global_to_shared(up, [row, column], bar, s_up.index(stage), pred=wanted)
    tma.async_copy_global_to_shared(a, [0, column], bar, s_a.index(stage), pred=wanted)


@gluon.jit(do_not_specialize=["rows", "splits"])
def forward(
    gate, up, out, a, parts, rows, size, splits, GELU: gl.constexpr, RANK: gl.constexpr,
    HEIGHT: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Act of a block of rows and a part of the columns, and its part of act A^T."""
    dtype: gl.constexpr = gate.dtype
    shared: gl.constexpr = WARPS * 16 // HEIGHT if WARPS * 16 > HEIGHT else 1
    by_row: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [WARPS, 1], [1, 0])
    of_sums: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [WARPS // shared, shared], [16, RANK // shared, 16]
    )
    s_gate = gl.allocate_shared_memory(dtype, [STAGES, HEIGHT, WIDTH], gate.layout)
    s_up = gl.allocate_shared_memory(dtype, [STAGES, HEIGHT, WIDTH], up.layout)
    s_a = gl.allocate_shared_memory(dtype, [STAGES, RANK, WIDTH], a.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(arrived.index(i), count=1)
    fence_async_shared()
    synchronize()
    split, row = gl.program_id(0) % splits, gl.program_id(0) // splits * HEIGHT
    chunks = gl.cdiv(size, WIDTH)
    each = gl.cdiv(chunks, splits)
    first_column = split * each * WIDTH
    steps = gl.minimum(each, chunks - split * each)
    for ahead in gl.static_range(STAGES):
        _load_forward(
            gate, up, a, s_gate, s_up, s_a, arrived, gl.to_tensor(ahead), row, first_column,
            ahead < steps, RANK, HEIGHT, WIDTH, STAGES,
        )  # fmt: skip
    sums = gl.zeros([HEIGHT, RANK], gl.float32, of_sums)
    for step in range(steps):
        stage = step % STAGES
        mbarrier.wait(arrived.index(stage), step // STAGES & 1)
        act = s_gate.index(stage)
        x = act.load(by_row).to(gl.float32)
        found = x * _share(x, GELU) * s_up.index(stage).load(by_row).to(gl.float32)
        act.store(found.to(dtype))
        fence_async_shared()
        tma.store_wait(0)  # the step before has been stored: its place is free
        synchronize()
        _load_forward(
            gate, up, a, s_gate, s_up, s_a, arrived, step + STAGES - 1, row, first_column,
            (step > 0) & (step + STAGES - 1 < steps), RANK, HEIGHT, WIDTH, STAGES,
        )  # fmt: skip
        sums = warpgroup_mma(act, s_a.index(stage).permute((1, 0)), sums, is_async=True)
        tma.async_copy_shared_to_global(out, [row, first_column + step * WIDTH], act)
        sums = warpgroup_mma_wait(0, [sums])
    tma.store_wait(0)
    at = gl.expand_dims(row + gl.arange(0, HEIGHT, gl.SliceLayout(1, of_sums)), 1)
    k = gl.expand_dims(gl.arange(0, RANK, gl.SliceLayout(0, of_sums)), 0)
    gl.store(parts + (split.to(gl.int64) * rows + at) * RANK + k, sums, mask=at < rows)


@gluon.jit
def _load_backward(
    into, gate, up, h, into_h, s_y, s_into, s_h, arrived, step, CHUNK: gl.constexpr, first_block,
    first_column, rank, wanted, RANK: gl.constexpr, HEIGHT: gl.constexpr, WIDTH: gl.constexpr,
    CHUNKS: gl.constexpr, STAGES: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    """Let TMA fetch the tiles of a step, and those of h with the first one of a block of rows."""
    stage, block = step % STAGES, step // CHUNKS
    row, column = (first_block + block) * HEIGHT, first_column + CHUNK * WIDTH
    bar, y = arrived.index(stage), s_y.index(stage)
    if CHUNK == 0:
        mbarrier.expect(bar, 6 * HEIGHT * (WIDTH + RANK), pred=wanted)
        place = 3 * (block % BLOCKS)
        tma.async_copy_global_to_shared(h, [row, 0], bar, s_h.index(place), pred=wanted)
        tma.async_copy_global_to_shared(h, [row, rank], bar, s_h.index(place + 1), pred=wanted)
        tma.async_copy_global_to_shared(into_h, [row, 0], bar, s_h.index(place + 2), pred=wanted)
    else:
        mbarrier.expect(bar, 6 * HEIGHT * WIDTH, pred=wanted)
    at = [row, column]
    tma.async_copy_global_to_shared(gate, at, bar, y.slice(0, HEIGHT, 0), pred=wanted)
    tma.async_copy_global_to_shared(up, at, bar, y.slice(HEIGHT, HEIGHT, 0), pred=wanted)
    tma.async_copy_global_to_shared(into, at, bar, s_into.index(stage), pred=wanted)


@gluon.jit
def _gradients_in_place(
    y, into, to_gate, to_up, strides, scale, row, rows, column, size,
    HEIGHT: gl.constexpr, WIDTH: gl.constexpr, PIECE: gl.constexpr, GELU: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Overwrite gate above up, `y` [2 HEIGHT, WIDTH], with their gradients, and `into` with act.

    `into` [HEIGHT, WIDTH] is act's gradient before. See `gradients` in mlp_kernel.py. With `scale`
    the gradients over it go to `to_gate` and `to_up` in float8, which have `strides`.
    """
    for i in gl.static_range(HEIGHT // PIECE):
        at_gate, at_up = y.slice(i * PIECE, PIECE, 0), y.slice(HEIGHT + i * PIECE, PIECE, 0)
        at_into = into.slice(i * PIECE, PIECE, 0)
        gradient = at_into.load(LAYOUT).to(gl.float32)
        gate, up = at_gate.load(LAYOUT).to(gl.float32), at_up.load(LAYOUT).to(gl.float32)
        part = _share(gate, GELU)
        passed = gate * part
        slope = passed * (1.0 - part)
        if GELU:
            slope *= 1.5957691216057308 + 0.21406444881780074 * gate * gate
        into_gate, into_up = gradient * up * (part + slope), gradient * passed
        at_gate.store(into_gate.to(y.dtype))
        at_up.store(into_up.to(y.dtype))
        at_into.store((passed * up).to(y.dtype))
        if scale is not None:
            at = i * PIECE + gl.arange(0, PIECE, gl.SliceLayout(1, LAYOUT))
            by = gl.expand_dims(1.0 / gl.load(scale + row + at, mask=row + at < rows, other=1.0), 1)
            at = gl.expand_dims(at, 1)
            k = gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT)), 0)
            inside, first = (row + at < rows) & (column + k < size), gl.to_tensor(row).to(gl.int64)
            places = to_gate + first * strides[0] + column + at * strides[0] + k
            gl.store(places, (into_gate * by).to(to_gate.dtype.element_ty), mask=inside)
            places = to_up + first * strides[1] + column + at * strides[1] + k
            gl.store(places, (into_up * by).to(to_up.dtype.element_ty), mask=inside)


@gluon.jit
def _store_rows(
    parts, sums, group, row, rows, HEIGHT: gl.constexpr, RANK: gl.constexpr, LAYOUT: gl.constexpr
):
    """Store gate's rows of `sums` in its columns, and up's, below them, in up's."""
    i = gl.expand_dims(gl.arange(0, 2 * HEIGHT, gl.SliceLayout(1, LAYOUT)), 1)
    k = gl.expand_dims(gl.arange(0, 2 * RANK, gl.SliceLayout(0, LAYOUT)), 0)
    at = row + i % HEIGHT
    places = parts + (group.to(gl.int64) * rows + at) * (2 * RANK) + k
    gl.store(places, sums, mask=(at < rows) & (i // HEIGHT == k // RANK))


@gluon.jit
def _store_columns(
    parts, sums, column, size, WIDTH: gl.constexpr, RANK: gl.constexpr, LAYOUT: gl.constexpr
):
    at = gl.expand_dims(column + gl.arange(0, WIDTH, gl.SliceLayout(1, LAYOUT)), 1)
    k = gl.expand_dims(gl.arange(0, RANK, gl.SliceLayout(0, LAYOUT)), 0)
    gl.store(parts + at * RANK + k, sums, mask=at < size)


@gluon.jit(do_not_specialize=["rows", "rank", "splits", "groups"])
def backward(
    into, gate, up, to_gate, to_up, strides, scale, h, into_h, b, b_stride, part_rows,
    part_columns, rows, size, rank, splits, groups, GELU: gl.constexpr, RANK: gl.constexpr,
    HEIGHT: gl.constexpr, WIDTH: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
    PIECE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The gradients of y in a part of the rows and CHUNKS tiles of columns, and their sums.

    Sums over rows stay in registers until the end: [columns, RANK] of gate, up and act each. Those
    over columns are stored after each block of rows: gate above up, [2 HEIGHT, 2 RANK]. With
    `scale` [rows] the gradients go to matrices in float8, else to descriptors of those in 16 bits.
    """
    dtype: gl.constexpr = gate.dtype
    shared_rows: gl.constexpr = WARPS * 8 // HEIGHT if WARPS * 8 > HEIGHT else 1
    shared_columns: gl.constexpr = WARPS * 16 // WIDTH if WARPS * 16 > WIDTH else 1
    by_row: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [WARPS, 1], [1, 0])
    of_b: gl.constexpr = gl.BlockedLayout([1, 8], [128 // RANK, RANK // 4], [WARPS, 1], [1, 0])
    of_rows: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [WARPS // shared_rows, shared_rows], [16, 2 * RANK // shared_rows, 16]
    )
    of_columns: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [WARPS // shared_columns, shared_columns], [16, RANK // shared_columns, 16]
    )
    tiles_of_b: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=4 * RANK, element_bitwidth=16, rank=2
    )
    blocks_at_once: gl.constexpr = (CHUNKS + STAGES - 2) // CHUNKS + 1
    s_y = gl.allocate_shared_memory(dtype, [STAGES, 2 * HEIGHT, WIDTH], gate.layout)
    s_into = gl.allocate_shared_memory(dtype, [STAGES, HEIGHT, WIDTH], into.layout)
    s_h = gl.allocate_shared_memory(dtype, [3 * blocks_at_once, HEIGHT, RANK], h.layout)
    s_b = gl.allocate_shared_memory(dtype, [CHUNKS, WIDTH, 2 * RANK], tiles_of_b)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(arrived.index(i), count=1)
    fence_async_shared()
    synchronize()
    group, split = gl.program_id(0) % groups, gl.program_id(0) // groups
    first_column = group * (CHUNKS * WIDTH)
    blocks = gl.cdiv(rows, HEIGHT)
    each = gl.cdiv(blocks, splits)
    first_block = split * each
    own_blocks = gl.minimum(each, blocks - first_block)
    steps = own_blocks * CHUNKS
    for ahead in gl.static_range(STAGES):
        _load_backward(
            into, gate, up, h, into_h, s_y, s_into, s_h, arrived, gl.to_tensor(ahead),
            ahead % CHUNKS, first_block, first_column, rank, ahead < steps, RANK, HEIGHT, WIDTH,
            CHUNKS, STAGES, blocks_at_once,
        )  # fmt: skip
    k = gl.expand_dims(gl.arange(0, 2 * RANK, gl.SliceLayout(0, of_b)), 0)
    is_up, k = k // RANK, k % RANK
    for i in gl.static_range(CHUNKS):
        at = first_column + i * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(1, of_b))
        at = gl.expand_dims(at, 1)
        places = b + (is_up * size + at) * b_stride + is_up * rank + k
        s_b.index(i).store(gl.load(places, mask=(at < size) & (k < rank), other=0.0))
    sums = gl.zeros([2 * HEIGHT, 2 * RANK], gl.float32, of_rows)
    zero = gl.zeros([WIDTH, RANK], gl.float32, of_columns)
    zeros = (zero,)
    for _ in gl.static_range(CHUNKS - 1):
        zeros = zeros + (zero,)
    sums_gate, sums_up, sums_act = zeros, zeros, zeros
    for block in range(own_blocks):
        row, place = (first_block + block) * HEIGHT, 3 * (block % blocks_at_once)
        for c in gl.static_range(CHUNKS):
            step = block * CHUNKS + c
            stage = step % STAGES
            mbarrier.wait(arrived.index(stage), step // STAGES & 1)
            y, act = s_y.index(stage), s_into.index(stage)
            column = first_column + c * WIDTH
            _gradients_in_place(
                y, act, to_gate, to_up, strides, scale, row, rows, column, size,
                HEIGHT, WIDTH, PIECE, GELU, by_row,
            )  # fmt: skip
            fence_async_shared()
            tma.store_wait(0)  # the step before has been stored: its place is free
            synchronize()
            _load_backward(
                into, gate, up, h, into_h, s_y, s_into, s_h, arrived, step + STAGES - 1,
                (c + STAGES - 1) % CHUNKS, first_block, first_column, rank,
                (step > 0) & (step + STAGES - 1 < steps), RANK, HEIGHT, WIDTH, CHUNKS, STAGES,
                blocks_at_once,
            )  # fmt: skip
            into_gate, into_up = y.slice(0, HEIGHT, 0), y.slice(HEIGHT, HEIGHT, 0)
            sums = warpgroup_mma(y, s_b.index(c), sums, use_acc=c > 0, is_async=True)
            of_gate = warpgroup_mma(
                into_gate.permute((1, 0)), s_h.index(place), sums_gate[c], is_async=True
            )
            of_up = warpgroup_mma(
                into_up.permute((1, 0)), s_h.index(place + 1), sums_up[c], is_async=True
            )
            of_act = warpgroup_mma(
                act.permute((1, 0)), s_h.index(place + 2), sums_act[c], is_async=True
            )
            if scale is None:
                tma.async_copy_shared_to_global(to_gate, [row, column], into_gate)
                tma.async_copy_shared_to_global(to_up, [row, column], into_up)
            sums, of_gate, of_up, of_act = warpgroup_mma_wait(0, [sums, of_gate, of_up, of_act])
            sums_gate = sums_gate[:c] + (of_gate,) + sums_gate[c + 1 :]
            sums_up = sums_up[:c] + (of_up,) + sums_up[c + 1 :]
            sums_act = sums_act[:c] + (of_act,) + sums_act[c + 1 :]
        _store_rows(part_rows, sums, group, row, rows, HEIGHT, RANK, of_rows)
    tma.store_wait(0)
    part_b = part_columns + split * 2 * size * RANK
    part_a = part_columns + (splits * 2 + split) * size * RANK
    for i in gl.static_range(CHUNKS):
        at = first_column + i * WIDTH
        _store_columns(part_b, sums_gate[i], at, size, WIDTH, RANK, of_columns)
        _store_columns(part_b + size * RANK, sums_up[i], at, size, WIDTH, RANK, of_columns)
        _store_columns(part_a, sums_act[i], at, size, WIDTH, RANK, of_columns)
