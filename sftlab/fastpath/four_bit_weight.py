"""Frozen 4-bit weights as operations that torch.compile takes as they are.

On a GPU they are the kernel of four_bit_kernel.py; elsewhere bitsandbytes' own operations.
"""

from collections.abc import Sequence
from functools import cache

import torch

from sftlab.fastpath.mlp_ops import has_kernels


@torch.library.custom_op("sftlab::four_bit_weight", mutates_args=())
def four_bit_weight(
    packed: torch.Tensor,
    scales: torch.Tensor,
    code: torch.Tensor | None,
    larger: torch.Tensor | None,
    offset: torch.Tensor | None,
    block: int,
    kind: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    after: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the weights [rows, columns] that `packed` holds, as bitsandbytes gives them back.

    `block` weights share one of `scales`. These are nested where `code`, `larger` and `offset` are
    given: fill_four_bit_weight says how. `kind` is nf4 or fp4. Nothing is read of `after`. A
    backward names its gradient there: else torch.compile would give the forward's weight to the
    backward too, and keep all of them in memory meanwhile.
    """
    out = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    nested = None if code is None else (code, larger, offset)
    _fill(packed, scales, nested, block, kind, out)
    return out


four_bit_weight.register_fake(
    lambda packed, scales, code, larger, offset, block, kind, rows, columns, dtype, after=None: (
        packed.new_empty(rows, columns, dtype=dtype)
    )
)


@torch.library.custom_op("sftlab::four_bit_beside", mutates_args=())
def four_bit_beside(
    weights: Sequence[torch.Tensor],
    sizes: Sequence[int],
    b: torch.Tensor,
    columns: int,
    block: int,
    kind: str,
) -> torch.Tensor:
    """Returns weights [out, columns] below one another, with `b` [all out, ranks] on their right.

    `weights` are the tensors of each, of `sizes` rows, as four_bit_weight takes them: `packed` and
    `scales`, and where scales are nested `code`, `larger` and `offset`.
    """
    out = b.new_empty(len(b), columns + b.shape[1])
    _fill_each(weights, sizes, block, kind, out[:, :columns])
    out[:, columns:] = b
    return out


four_bit_beside.register_fake(
    lambda weights, sizes, b, columns, block, kind: b.new_empty(b.shape[0], columns + b.shape[1])
)


@torch.library.custom_op("sftlab::four_bit_above", mutates_args=())
def four_bit_above(
    weights: Sequence[torch.Tensor],
    sizes: Sequence[int],
    a: torch.Tensor,
    block: int,
    kind: str,
    after: torch.Tensor,
) -> torch.Tensor:
    """Returns weights [out, in] below one another, and `a` [ranks, in] below them.

    `weights` are those of four_bit_beside, and `after` is that of four_bit_weight.
    """
    rows = sum(sizes)
    out = a.new_empty(rows + len(a), a.shape[1])
    _fill_each(weights, sizes, block, kind, out[:rows])
    out[rows:] = a
    return out


four_bit_above.register_fake(
    lambda weights, sizes, a, block, kind, after: a.new_empty(sum(sizes) + a.shape[0], a.shape[1])
)


def _fill_each(
    weights: Sequence[torch.Tensor], sizes: Sequence[int], block: int, kind: str, out: torch.Tensor
) -> None:
    each = len(weights) // len(sizes)
    for i, into in enumerate(out.split(list(sizes))):
        packed, scales, *nested = weights[i * each : (i + 1) * each]
        _fill(packed, scales, nested or None, block, kind, into)


def _fill(
    packed: torch.Tensor,
    scales: torch.Tensor,
    nested: Sequence[torch.Tensor] | None,
    block: int,
    kind: str,
    out: torch.Tensor,
) -> None:
    """Fill `out` [rows, columns], whose rows may have gaps between them."""
    if has_kernels(packed):
        from sftlab.fastpath.four_bit_kernel import fill_four_bit_weight

        fill_four_bit_weight(packed, scales, nested, table_of(kind, packed.device), block, out)
        return
    out.copy_(given_back(packed, scales, nested, block, kind, out.shape, out.dtype))


def given_back(
    packed: torch.Tensor,
    scales: torch.Tensor,
    nested: Sequence[torch.Tensor] | None,
    block: int,
    kind: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Returns the weights of `shape` by bitsandbytes' operations."""
    give_back = torch.ops.bitsandbytes.dequantize_4bit.default
    return give_back(packed, whole_scales(scales, nested), block, kind, list(shape), dtype)


def whole_scales(scales: torch.Tensor, nested: Sequence[torch.Tensor] | None) -> torch.Tensor:
    """Returns the blocks' scales in float32, those that are nested given back."""
    if not nested:
        return scales
    code, larger, offset = nested
    whole = torch.ops.bitsandbytes.dequantize_blockwise.default
    return whole(scales, larger, code, 256, torch.float32) + offset


@cache
def table_of(kind: str, device: torch.device) -> torch.Tensor:
    """Returns the 16 numbers that four bits stand for, float32."""
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type(kind, device)
