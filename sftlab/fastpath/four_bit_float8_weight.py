"""Frozen 4-bit weights in float8, in the order in which each product reads them.

On a GPU they are the kernel of four_bit_kernel.py; elsewhere plain torch after bitsandbytes' own
operations. A weight is rounded once: from what its 4 bits stand for in float32.
"""

from collections.abc import Sequence

import torch

from sftlab.fastpath.float8 import FORWARD, transpose
from sftlab.fastpath.four_bit_weight import given_back, table_of, whole_scales
from sftlab.fastpath.mlp_ops import has_kernels

LARGEST = torch.finfo(FORWARD).max


@torch.library.custom_op("sftlab::four_bit_float8", mutates_args=())
def four_bit_float8(
    packed: torch.Tensor,
    scales: torch.Tensor,
    code: torch.Tensor | None,
    larger: torch.Tensor | None,
    offset: torch.Tensor | None,
    block: int,
    kind: str,
    rows: int,
    columns: int,
    scale: torch.Tensor,
    transposed: bool,
    after: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the weights over `scale` in float8, [rows, columns], or [columns, rows] `transposed`.

    `scale` [1, ...] is float8_scale's, in every place. The rest, `after` too, is as four_bit_weight
    takes it.
    """
    nested = None if code is None else (code, larger, offset)
    if not has_kernels(packed):
        shape = rows, columns
        return plainly(packed, scales, nested, block, kind, shape, scale, transposed)
    from sftlab.fastpath.four_bit_kernel import fill_four_bit_float8

    out = _room(packed, rows, columns, transposed)
    table = table_of(kind, packed.device)
    fill_four_bit_float8(packed, scales, nested, table, block, scale, transposed, out)
    return out


four_bit_float8.register_fake(
    lambda packed, scales, code, larger, offset, block, kind, rows, columns, scale, transposed,
    after=None: _room(packed, rows, columns, transposed)
)  # fmt: skip


def _room(packed: torch.Tensor, rows: int, columns: int, transposed: bool) -> torch.Tensor:
    return packed.new_empty((columns, rows) if transposed else (rows, columns), dtype=FORWARD)


def plainly(
    packed: torch.Tensor,
    scales: torch.Tensor,
    nested: Sequence[torch.Tensor] | None,
    block: int,
    kind: str,
    shape: Sequence[int],
    scale: torch.Tensor,
    transposed: bool,
) -> torch.Tensor:
    """Returns what four_bit_float8 does, without its kernel; `shape` is the weight's."""
    whole = given_back(packed, scales, nested, block, kind, shape, torch.float32)
    rounded = (whole / scale[0, 0]).clamp(-LARGEST, LARGEST).to(FORWARD)
    return transpose(rounded) if transposed else rounded


def float8_scale(
    scales: torch.Tensor, nested: Sequence[torch.Tensor] | None, kind: str
) -> torch.Tensor:
    """Returns the scale of a whole weight in float8, [1, 1]; what is given is as for `plainly`.

    It is the smallest power of two that leaves no weight above the largest number of float8. So
    dividing by it changes no digit. float8 has an exponent, and needs no scale for each block.
    """
    most = whole_scales(scales, nested).abs().max() * table_of(kind, scales.device).abs().max()
    part, power = torch.frexp((most / LARGEST).clamp(min=1e-12))
    power = power - (part == 0.5).int()  # it is a power of two itself
    return torch.ldexp(torch.ones_like(most), power).view(1, 1)
