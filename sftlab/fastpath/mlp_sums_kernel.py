"""Triton kernel: the gradient of a gated activation, and the sums over rows that LoRA needs of it.

The gradients of B of gate and up and of A of down read what mlp_kernel.py's `gated_backward_`
writes. Here they are summed while it is in registers, so that three matrices are not read again,
and the activation is not written at all.
"""

import torch
import triton
import triton.language as tl

# rows and columns of a tile, rows of a part, warps and stages
FORM = (64, 64, 1024, 4, 2)


def gated_backward_sums(
    gradient: torch.Tensor,
    y: torch.Tensor,
    gelu: bool,
    out: torch.Tensor,
    h: torch.Tensor,
    into_h: torch.Tensor,
    rank: int,
    rank_down: int,
    form: tuple = FORM,
) -> torch.Tensor:
    """Fill `out` [rows, 2 size] with the gradients of gate and up, as `gated_backward_` does.

    `h` [rows, ...] begins with the h of gate and that of up, `rank` columns each, `into_h` with
    `rank_down` columns of the gradient of down's h. Returns [3, ranks, size] in float32: h^T times
    the gradients of gate and of up, and into_h^T times the activation; ranks behind the last are 0.
    """
    rows, size = gradient.shape
    height, width, part_rows, warps, stages = form
    ranks = max(16, triton.next_power_of_2(max(rank, rank_down)))
    parts = max(1, triton.cdiv(rows, part_rows))
    sums = torch.empty(parts, 3, ranks, size, dtype=torch.float32, device=y.device)
    _gated_sums[(triton.cdiv(size, width), parts)](
        gradient, gradient.stride(0), y, y.stride(0), out, out.stride(0), h, h.stride(0),
        into_h, into_h.stride(0), sums, rows, size, part_rows, rank, rank_down, ranks, gelu,
        height, width, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return sums.sum(0)


@triton.jit(do_not_specialize=["rows"])
def _gated_sums(
    gradient, gradient_stride, y, y_stride, out, out_stride, h, h_stride, into_h, into_h_stride,
    sums, rows, size, part_rows, RANK: tl.constexpr, RANK_DOWN: tl.constexpr, RANKS: tl.constexpr,
    GELU: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)[None, :]
    of_rank = tl.arange(0, RANKS)[None, :]
    b_gate = tl.zeros((RANKS, WIDTH), tl.float32)
    b_up = tl.zeros((RANKS, WIDTH), tl.float32)
    a_down = tl.zeros((RANKS, WIDTH), tl.float32)
    first = tl.program_id(1) * part_rows
    for start in range(first, tl.minimum(first + part_rows, rows), HEIGHT):
        row = (start + tl.arange(0, HEIGHT)).to(tl.int64)[:, None]
        inside = (row < rows) & (at < size)
        places = y + row * y_stride + at
        gate = tl.load(places, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(places + size, mask=inside, other=0.0).to(tl.float32)
        into = tl.load(gradient + row * gradient_stride + at, mask=inside, other=0.0)
        into = into.to(tl.float32)
        known = (row < rows) & (of_rank < RANK)
        h_gate = tl.load(h + row * h_stride + of_rank, mask=known, other=0.0)
        h_up = tl.load(h + row * h_stride + RANK + of_rank, mask=known, other=0.0)
        known = (row < rows) & (of_rank < RANK_DOWN)
        h_down = tl.load(into_h + row * into_h_stride + of_rank, mask=known, other=0.0)
        if GELU:  # as in mlp_kernel.py
            share = tl.sigmoid(gate * (1.5957691216057308 + 0.07135481627260025 * gate * gate))
        else:
            share = tl.sigmoid(gate)
        passed = gate * share
        slope = passed * (1.0 - share)
        if GELU:
            slope *= 1.5957691216057308 + 0.21406444881780074 * gate * gate
        into_gate = (into * up * (share + slope)).to(out.dtype.element_ty)
        into_up = (into * passed).to(out.dtype.element_ty)
        places = out + row * out_stride + at
        tl.store(places, into_gate, mask=inside)
        tl.store(places + size, into_up, mask=inside)
        act = (passed * up).to(out.dtype.element_ty)
        b_gate = tl.dot(tl.trans(h_gate), into_gate, b_gate, input_precision="ieee")
        b_up = tl.dot(tl.trans(h_up), into_up, b_up, input_precision="ieee")
        a_down = tl.dot(tl.trans(h_down), act, a_down, input_precision="ieee")
    place = tl.program_id(1).to(tl.int64) * 3 * RANKS + tl.arange(0, RANKS)[:, None]
    places = sums + place * size + at
    tl.store(places, b_gate, mask=at < size)
    tl.store(places + RANKS * size, b_up, mask=at < size)
    tl.store(places + 2 * RANKS * size, a_down, mask=at < size)
