"""The table of tiles that tells attention kernels where packed rows begin and end."""

from collections.abc import Sequence

import numpy as np
import torch

# tokens of a part of the table, and of a tile: usually, and of long rows
TILE, LONG_TILE = 64, 128
# Rows are long from here on: on rows of 4,096 tokens long tiles were faster, on rows of 300 to
# 1,024 slower. Nothing between has been measured.
LONG_ROW = 2048


def tile_for(lengths: Sequence[int] | np.ndarray) -> int:
    """Returns the tokens of a tile for attention over rows of these lengths: 64 or 128.

    It is 128 where the average token is in a row of 2,048 tokens or more, since the work on a row
    grows with its square. On an H200 in bfloat16, kernels over heads of 128 elements then took 0.90
    to 0.93 of the time over 64 on rows of 4,096 tokens. On rows of 300 to 1,024 tokens they took
    1.05 to 1.09. How much of a tile a program takes, the kernels decide from head and window.
    """
    tokens = np.asarray(lengths, dtype=np.float64)
    return LONG_TILE if 0 < LONG_ROW * tokens.sum() <= (tokens**2).sum() else TILE


def tile_of(table: torch.Tensor) -> int:
    """Returns the tokens of a tile of a table, [2, tiles, parts, 3]."""
    return table.shape[2] * TILE


def tiles(lengths: Sequence[int], tile: int = TILE, count: int = 0) -> torch.Tensor:
    """Returns sequences of these lengths in tiles, [2, tiles, parts, 3] int32.

    A tile has at most `tile` tokens of a sequence, in parts of 64. A part is its sequence's start
    and end, and its own first token, which is behind the end where the part is empty. So the shape
    says how many tokens a tile has, and a program can take a tile, a part, or less. The first table
    is for programs that read what comes before a tile, the second for those that read what comes
    after it. Both begin with the most work. Empty tiles at the end fill up to `count`, and keep the
    second table aligned to 16 bytes, because Triton compiles a kernel anew for one that is not.
    """
    found, start = [], 0
    for length in lengths:
        found += [(start, start + length, first) for first in range(start, start + length, tile)]
        start += length
    found += [(start, start, start)] * (count - len(found))
    found += [(start, start, start)] * (-len(found) % 4)
    before = sorted(found, key=lambda one: one[0] - one[2])
    after = sorted(found, key=lambda one: one[2] - one[1])
    table = torch.tensor([before, after], dtype=torch.int32)[:, :, None]
    parts = torch.zeros(tile // TILE, 3, dtype=torch.int32)
    parts[:, 2] = torch.arange(0, tile, TILE)
    return table + parts
