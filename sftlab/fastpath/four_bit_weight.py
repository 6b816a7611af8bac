"""A frozen 4-bit weight as one operation that torch.compile takes as it is.

On a GPU it is the kernel of four_bit_kernel.py; elsewhere bitsandbytes' own operations.
"""

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
    if has_kernels(packed):
        from sftlab.fastpath.four_bit_kernel import fill_four_bit_weight

        out = torch.empty(rows, columns, dtype=dtype, device=packed.device)
        nested = None if code is None else (code, larger, offset)
        fill_four_bit_weight(packed, scales, nested, table_of(kind, packed.device), block, out)
        return out
    if code is not None:
        whole = torch.ops.bitsandbytes.dequantize_blockwise.default
        scales = whole(scales, larger, code, 256, torch.float32) + offset
    give_back = torch.ops.bitsandbytes.dequantize_4bit.default
    return give_back(packed, scales, block, kind, [rows, columns], dtype)


@four_bit_weight.register_fake
def _(
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
    return packed.new_empty(rows, columns, dtype=dtype)


@cache
def table_of(kind: str, device: torch.device) -> torch.Tensor:
    """Returns the 16 numbers that four bits stand for, float32."""
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type(kind, device)
