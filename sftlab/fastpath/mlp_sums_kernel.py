"""Triton kernels: a gated activation and its gradient, with the sums that LoRA needs of them.

h of down reads the activation, and the gradients of B of gate and up and of A of down read what
mlp_kernel.py's `gated_backward_` writes. Here they are summed while it is in registers, so that
these matrices are not read again. In the backward the activation is not written at all.
"""

import torch
import triton
import triton.language as tl

from sftlab.fastpath.mlp_kernel import gate_and_up, gradients, share

# rows and columns of a tile, rows of a part, warps and stages
FORM = (32, 64, 1024, 4, 2)
# rows and columns of a tile, warps and stages
FORM_OF_H = (32, 128, 4, 3)


def gated_with_h(
    y: torch.Tensor, gelu: bool, out: torch.Tensor, a: torch.Tensor, form: tuple = FORM_OF_H
) -> None:
    """Fill `out` [rows, size + ranks] with act = f(gate) up of y = [gate, up], and act a^T, then 0.

    `a` [rank, size] has fewer rows than `out` has columns beside act.
    """
    rows, size = len(out), a.shape[1]
    height, width, warps, stages = form
    _gated_with_h[(triton.cdiv(rows, height),)](
        y, y.stride(0), out, out.stride(0), a, a.stride(0), rows, size, out.shape[1] - size,
        len(a), _ranks(len(a)), _ranks(out.shape[1] - size), gelu, height, width,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _ranks(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


@triton.jit(do_not_specialize=["rows"])
def _gated_with_h(
    y, y_stride, out, out_stride, a, a_stride, rows, size, beside,
    RANK: tl.constexpr, RANKS: tl.constexpr, BESIDE: tl.constexpr, GELU: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)).to(tl.int64)[:, None]
    of_rank = tl.arange(0, RANKS)
    h = tl.zeros((HEIGHT, RANKS), tl.float32)
    for start in range(0, size, WIDTH):
        at = start + tl.arange(0, WIDTH)[None, :]
        inside = (row < rows) & (at < size)
        gate, up = gate_and_up(y, row * y_stride, at, size, inside)
        known = (of_rank[:, None] < RANK) & (at < size)
        part = tl.load(a + of_rank[:, None] * a_stride + at, mask=known, other=0.0)
        act = (gate * share(gate, GELU) * up).to(out.dtype.element_ty)
        tl.store(out + row * out_stride + at, act, mask=inside)
        h = tl.dot(act, tl.trans(part), h, input_precision="ieee")
    at = tl.arange(0, BESIDE)[None, :]
    zero = tl.zeros((HEIGHT, BESIDE), tl.float32).to(out.dtype.element_ty)
    places = out + row * out_stride + size
    tl.store(places + at, zero, mask=(row < rows) & (at >= RANK) & (at < beside))
    found = h.to(out.dtype.element_ty)
    tl.store(places + of_rank[None, :], found, mask=(row < rows) & (of_rank[None, :] < RANK))


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
    ranks = _ranks(max(rank, rank_down))
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
        gate, up = gate_and_up(y, row * y_stride, at, size, inside)
        into = tl.load(gradient + row * gradient_stride + at, mask=inside, other=0.0)
        into = into.to(tl.float32)
        known = (row < rows) & (of_rank < RANK)
        h_gate = tl.load(h + row * h_stride + of_rank, mask=known, other=0.0)
        h_up = tl.load(h + row * h_stride + RANK + of_rank, mask=known, other=0.0)
        known = (row < rows) & (of_rank < RANK_DOWN)
        h_down = tl.load(into_h + row * into_h_stride + of_rank, mask=known, other=0.0)
        into_gate, into_up, act = gradients(into, gate, up, GELU)
        into_gate, into_up = into_gate.to(out.dtype.element_ty), into_up.to(out.dtype.element_ty)
        places = out + row * out_stride + at
        tl.store(places, into_gate, mask=inside)
        tl.store(places + size, into_up, mask=inside)
        act = act.to(out.dtype.element_ty)
        b_gate = tl.dot(tl.trans(h_gate), into_gate, b_gate, input_precision="ieee")
        b_up = tl.dot(tl.trans(h_up), into_up, b_up, input_precision="ieee")
        a_down = tl.dot(tl.trans(h_down), act, a_down, input_precision="ieee")
    place = tl.program_id(1).to(tl.int64) * 3 * RANKS + tl.arange(0, RANKS)[:, None]
    places = sums + place * size + at
    tl.store(places, b_gate, mask=at < size)
    tl.store(places + RANKS * size, b_up, mask=at < size)
    tl.store(places + 2 * RANKS * size, a_down, mask=at < size)
