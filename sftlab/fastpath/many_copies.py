"""Copies of many small matrices with few kernels.

torch._foreach_copy_ starts one for each matrix whose rows do not follow one another in memory.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch

from sftlab.fastpath.mlp_ops import has_kernels

# Where matrices are, on their device, oldest first. A recorded step reads its tables again, and
# weights of recorded steps do not move; those of others may, so that only so many are kept.
_tables: dict[tuple, torch.Tensor] = {}
MOST_TABLES = 1000


def copy_all(
    out: Sequence[torch.Tensor],
    matrices: Sequence[torch.Tensor],
    factors: Sequence[float] | None = None,
) -> None:
    """Fill each of `out` [rows, columns] with its matrix times its factor; 1 unless given.

    Those that are alike in shape, strides, dtypes, place and factor share a kernel. torch copies
    what the kernel does not know, and refuses what does not fit.
    """
    alike, left = defaultdict(list), []
    factors = [1.0] * len(out) if factors is None else factors
    for one, matrix, factor in zip(out, matrices, factors, strict=True):
        if _has_kernel(one, matrix):
            kind = one.shape, one.stride(), one.dtype, matrix.stride(), matrix.dtype, one.device
            alike[*kind, factor].append((one, matrix))
        else:
            left.append((one, matrix if factor == 1.0 else matrix * factor))
    for (*_, factor), pairs in alike.items():
        to, given = zip(*pairs, strict=True)
        _start(_table(to), to[0], _table(given), given[0], len(to), 0, factor)
    if left:
        to, given = zip(*left, strict=True)
        torch._foreach_copy_(to, given)


def scatter(stack: torch.Tensor, out: Sequence[torch.Tensor]) -> None:
    """Fill each of `out` [rows, columns], all alike, with its matrix of `stack`; bytes as they are.

    `stack` is [matrices, rows, columns], and each of its matrices follows the one before.
    """
    stack, first = stack.view(torch.uint8), out[0].view(torch.uint8)
    if _has_kernel(first, stack[0]):
        _start(_table(out), first, stack, stack[0], len(out), stack.stride(0), 1.0)
    else:
        torch._foreach_copy_([one.view(torch.uint8) for one in out], list(stack))


def _has_kernel(one: torch.Tensor, matrix: torch.Tensor) -> bool:
    if not has_kernels(one) or one.device != matrix.device or one.shape != matrix.shape:
        return False
    from sftlab.fastpath.copies_kernel import TYPES

    return one.dtype in TYPES and matrix.dtype in TYPES and one.dim() == 2 and one.numel() > 0


def _start(*given: object) -> None:
    """Start copy_many, whose file needs Triton."""
    from sftlab.fastpath import copies_kernel

    copies_kernel.copy_many(*given)


def _table(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    device = matrices[0].device
    addresses = device, *(one.data_ptr() for one in matrices)
    if addresses not in _tables:
        if len(_tables) >= MOST_TABLES:
            del _tables[next(iter(_tables))]
        _tables[addresses] = torch.tensor(addresses[1:], device=device)
    return _tables[addresses]
