"""Copies of many small matrices with few kernels.

torch._foreach_copy_ starts one for each matrix whose rows do not follow one another in memory.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch

from sftlab.fastpath.mlp_ops import has_kernels

# where matrices are, on their device; kept, since a recorded step reads it again
_tables: dict[tuple, torch.Tensor] = {}


def copy_all(
    out: Sequence[torch.Tensor],
    matrices: Sequence[torch.Tensor],
    factors: Sequence[float] | None = None,
) -> None:
    """Fill each of `out` [rows, columns] with its matrix times its factor; 1 unless given.

    Those that are alike in shape, strides and factor share a kernel.
    """
    factors = [1.0] * len(out) if factors is None else factors
    if not has_kernels(out[0]) or out[0].element_size() > 4:
        if any(factor != 1.0 for factor in factors):
            matrices = torch._foreach_mul(matrices, factors)
        torch._foreach_copy_(out, matrices)
        return
    alike = defaultdict(list)
    for one, matrix, factor in zip(out, matrices, factors, strict=True):
        kind = one.shape, one.stride(), one.dtype, matrix.stride(), matrix.dtype, factor
        alike[kind].append((one, matrix))
    for (*_, factor), pairs in alike.items():
        to, given = zip(*pairs, strict=True)
        _start(_table(to), to[0], _table(given), given[0], len(to), 0, factor)


def scatter(stack: torch.Tensor, out: Sequence[torch.Tensor]) -> None:
    """Fill each of `out` [rows, columns], all alike, with its matrix of `stack`; bytes as they are.

    `stack` is [matrices, rows, columns], and each of its matrices follows the one before.
    """
    if not has_kernels(stack):
        torch._foreach_copy_([one.view(torch.uint8) for one in out], list(stack.view(torch.uint8)))
        return
    stack = stack.view(torch.uint8)
    first = out[0].view(torch.uint8)
    _start(_table(out), first, stack, stack[0], len(out), stack.stride(0), 1.0)


def _start(
    to: torch.Tensor,
    out: torch.Tensor,
    given: torch.Tensor,
    matrix: torch.Tensor,
    count: int,
    apart: int,
    factor: float,
) -> None:
    """Copy `count` matrices like `matrix` to ones like `out`: see copy_many."""
    from sftlab.fastpath import copies_kernel

    copies_kernel.copy_many(to, out, given, matrix, count, apart, factor)


def _table(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    addresses = tuple(one.data_ptr() for one in matrices)
    if addresses not in _tables:
        _tables[addresses] = torch.tensor(addresses, device=matrices[0].device)
    return _tables[addresses]
