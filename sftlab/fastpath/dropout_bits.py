"""LoRA's dropout: masks as bits, eight elements a byte, and products under them.

One call of Philox decides about eight elements, where torch.compile's dropout takes a call for
each. Bits are also an eighth of the memory that masks of bools take until the backward.
"""

import torch

# a random number of this many values decides about an element
LEVELS = 2**16


def kept_share(dropped: float) -> float:
    """Returns the share of elements that masks keep, within 1e-5 of 1 - `dropped`."""
    return 1 - _threshold(dropped) / LEVELS


def _threshold(dropped: float) -> int:
    return round(dropped * LEVELS)


@torch.library.custom_op("sftlab::dropout_bits", mutates_args=())
def dropout_bits(
    seed: torch.Tensor, count: int, rows: int, columns: int, dropped: float
) -> torch.Tensor:
    """Returns `count` masks, uint8 [count, rows, columns / 8]; a bit of 1 keeps its element.

    They depend on `seed` alone, an int64 [1].
    """
    shape = (count, rows, columns // 8)
    if seed.is_cuda:
        from sftlab.fastpath.dropout_kernel import fill_with_bits

        bits = torch.empty(shape, dtype=torch.uint8, device=seed.device)
        fill_with_bits(bits, seed, _threshold(dropped))
        return bits
    generator = torch.Generator().manual_seed(int(seed))
    numbers = torch.randint(LEVELS, (*shape, 8), generator=generator)
    kept = (numbers >= _threshold(dropped)).to(torch.uint8)
    return (kept << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


@dropout_bits.register_fake
def _(seed: torch.Tensor, count: int, rows: int, columns: int, dropped: float) -> torch.Tensor:
    return seed.new_empty((count, rows, columns // 8), dtype=torch.uint8)


def is_kept(bits: torch.Tensor) -> torch.Tensor:
    """Returns a mask of bits [rows, columns / 8] as bools [rows, columns]."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[..., None] >> places & 1).flatten(-2).bool()


@torch.library.custom_op("sftlab::project_dropped_", mutates_args=("beside",))
def project_dropped_(
    beside: torch.Tensor, a: torch.Tensor, bits: torch.Tensor, rank: int, factor: float
) -> None:
    """Write `factor` times (x without what is dropped) A^T of every layer beside x, in place.

    `beside` [rows, in + ...] begins with x; `a` has `rank` rows for each layer.
    """
    layers, columns = len(bits), a.shape[1]
    x, out = beside[:, :columns], beside[:, columns:]
    if beside.is_cuda:
        from sftlab.fastpath.dropout_kernel import project

        project(x, a, bits, rank, factor, out)
        return
    for one, part, place in zip(bits, a.split(rank), out.split(rank, 1)[:layers], strict=False):
        place.copy_(torch.where(is_kept(one), x, 0) @ part.t() * factor)


@torch.library.custom_op("sftlab::project_dropped_backward", mutates_args=())
def project_dropped_backward(
    gradient: torch.Tensor, x: torch.Tensor, bits: torch.Tensor, rank: int
) -> torch.Tensor:
    """Returns the gradient of A [layers x rank, in] from that of dropout(x) A^T."""
    if x.is_cuda:
        from sftlab.fastpath.dropout_kernel import project_transposed

        return project_transposed(gradient, x, bits, rank).to(x.dtype)
    by_layer = gradient.split(rank, 1)
    parts = [
        mine.t() @ torch.where(is_kept(one), x, 0)
        for mine, one in zip(by_layer, bits, strict=False)
    ]
    return torch.cat(parts)


@project_dropped_backward.register_fake
def _(gradient: torch.Tensor, x: torch.Tensor, bits: torch.Tensor, rank: int) -> torch.Tensor:
    return x.new_empty(len(bits) * rank, x.shape[1])
