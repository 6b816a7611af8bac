"""Launches kernels of a gated activation with LoRA's thin products in them, on a Hopper GPU.

The kernels are those of gated_lora_gluon.py. Programs share the columns or the rows of a product,
so each writes a part of its sums in float32. A second kernel adds up the parts in a fixed order:
results are the same every time.
"""

from functools import cache
from typing import NamedTuple

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sftlab.fastpath.ceil_div import ceil_div
from sftlab.fastpath.gated_lora_gluon import backward, forward
from sftlab.fastpath.parts_kernel import add_up, add_up_all


class Tiles(NamedTuple):
    """How a kernel goes through its matrices.

    Tiles have `height` rows and `width` columns, and `stages` of them are on their way at once. A
    program of the backward handles `chunks` tiles beside one another, `piece` rows of one at a
    time, and `at_once` programs run on a processor; one of the forward handles `columns`.
    """

    height: int
    width: int
    stages: int
    warps: int
    chunks: int = 1
    piece: int = 0
    columns: int = 0
    at_once: int = 1

    @property
    def registers(self) -> dict[str, int]:
        """What a kernel is told, so that `at_once` programs have room in a processor."""
        each = 65536 // (self.at_once * self.warps * 32)
        return {"num_warps": self.warps} | ({"maxnreg": each} if each < 256 else {})


# by the padded rank
FORWARD = {16: Tiles(64, 128, 3, 4, columns=1024), 32: Tiles(64, 64, 4, 4, columns=1024)}
BACKWARD = {
    16: Tiles(64, 128, 4, 16, chunks=2, piece=32),
    32: Tiles(64, 128, 3, 8, chunks=2, piece=32),
}
TO_FLOAT8 = BACKWARD | {16: Tiles(32, 128, 3, 8, chunks=2, piece=16, at_once=2)}


def gated_with_lora(
    y: torch.Tensor, a: torch.Tensor, rank: int, gelu: bool, out: torch.Tensor
) -> torch.Tensor:
    """Fill `out` [rows, size] with act = f(gate) up of y = [gate, up]; return act A^T.

    That is [rows, ranks] with as many columns as `a` [ranks, size] has rows. Rows of `a` from
    `rank` on are 0. f is SiLU or `gelu`'s tanh form.
    """
    rows, size = out.shape
    padded = _padded(rank)
    tiles = FORWARD[padded]
    found = y.new_empty(rows, len(a))
    splits = ceil_div(size, tiles.columns)
    parts = y.new_empty(splits, rows, padded, dtype=torch.float32)
    given = [_tiled(one, tiles.height, tiles.width) for one in (y[:, :size], y[:, size:], out)]
    forward[(ceil_div(rows, tiles.height) * splits,)](
        *given, _tiled(a, padded, tiles.width), parts, rows, size, splits, gelu, padded,
        tiles.height, tiles.width, tiles.stages, tiles.warps, num_warps=tiles.warps,
    )  # fmt: skip
    add_up(parts, rank, found)
    return found


def gated_backward_with_lora(
    gradient: torch.Tensor,
    y: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    into_h_down: torch.Tensor,
    rank: int,
    rank_down: int,
    gelu: bool,
    into_y: torch.Tensor,
    into_h: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill `into_y` [rows, 2 size] and `into_h` [rows, ranks] from the `gradient` of act.

    `gradient` is [rows, size], and y = [gate, up]. `h` [rows, ranks] and `b` [2 size, ranks] have
    `rank` columns of gate and then `rank` of up, and zeros. `into_h_down` [rows, ranks] has
    `rank_down` columns. Returns the gradients of b [2 size, ranks], 0 outside of gate's and up's
    own columns, and of down's A, [ranks, size].
    """
    size, tiles = gradient.shape[1], BACKWARD[_padded(max(rank, rank_down))]
    to = (_tiled(one, tiles.height, tiles.width) for one in (into_y[:, :size], into_y[:, size:]))
    given = gradient, y[:, :size], y[:, size:], h, b, into_h_down, rank, rank_down, gelu
    return _backward(*given, tiles, (*to, (0, 0), None), into_h)


def gated_backward_with_lora_to_float8(
    gradient: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    into_h_down: torch.Tensor,
    rank: int,
    rank_down: int,
    gelu: bool,
    scale: torch.Tensor,
    into_gate: torch.Tensor,
    into_up: torch.Tensor,
    into_h: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill `into_gate` and `into_up` [rows, size] in float8, over each row's `scale` [rows, 1].

    All else is as in gated_backward_with_lora; what comes of gradients comes of them in 16 bits.
    What is beyond the largest number of float8 becomes that.
    """
    given = gradient, gate, up, h, b, into_h_down, rank, rank_down, gelu
    tiles = TO_FLOAT8[_padded(max(rank, rank_down))]
    strides = into_gate.stride(0), into_up.stride(0)
    return _backward(*given, tiles, (into_gate, into_up, strides, scale), into_h)


def _backward(
    gradient: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    into_h_down: torch.Tensor,
    rank: int,
    rank_down: int,
    gelu: bool,
    tiles: Tiles,
    to: tuple,
    into_h: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    (rows, size), ranks, ranks_down = gradient.shape, b.shape[1], into_h_down.shape[1]
    padded = _padded(max(rank, rank_down))
    groups = ceil_div(size, tiles.width * tiles.chunks)
    splits = _splits(rows, groups, tiles, gradient.device)
    part_rows = gate.new_empty(groups, rows, 2 * padded, dtype=torch.float32)
    part_columns = gate.new_empty(splits * 3 * size * padded, dtype=torch.float32)
    backward[(groups * splits,)](
        *(_tiled(one, tiles.height, tiles.width) for one in (gradient, gate, up)), *to,
        *(_tiled(one, tiles.height, padded) for one in (h, into_h_down)),
        b, b.stride(0), part_rows, part_columns, rows, size, rank, splits, groups, gelu, padded,
        tiles.height, tiles.width, tiles.chunks, tiles.stages, tiles.piece, tiles.warps,
        **tiles.registers,
    )  # fmt: skip
    into_b, into_a_down = gate.new_empty(2 * size, ranks), gate.new_empty(ranks_down, size)
    add_up_all(part_rows, part_columns, splits, (rank, rank_down), into_h, into_b, into_a_down)
    return into_b, into_a_down


def _padded(rank: int) -> int:
    return next(padded for padded in BACKWARD if rank <= padded)


def _tiled(x: torch.Tensor, height: int, width: int) -> TensorDescriptor:
    """Returns x [rows, columns] as TMA takes it, to read or write in tiles of 16-bit elements."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [height, width], _layout(width))


@cache
def _layout(width: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * width), element_bitwidth=16, rank=2)


def _splits(rows: int, groups: int, tiles: Tiles, device: torch.device) -> int:
    """Returns how many programs share the rows of columns."""
    at_once = _processors(device) * tiles.at_once
    return _fewest_waits(ceil_div(rows, tiles.height), groups, at_once)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _fewest_waits(blocks: int, groups: int, at_once: int) -> int:
    """Returns into how many parts blocks are best divided, so that few processors wait."""

    def tiles_in_turn(splits: int) -> int:
        in_turn = ceil_div(groups * splits, at_once)
        return in_turn * (ceil_div(blocks, splits) + 2)  # its first tile and its last sums

    return min(range(1, 17), key=tiles_in_turn)
