"""The product of an input beside its LoRA part with frozen weights beside LoRA's B.

`ranks` are the columns of all A matrices, padded. The outputs come of W beside s B, `wide` [out,
in + ranks]. The gradient of the input comes of W above A, `tall` [out + ranks, in]. For whole
weights both are parts of one matrix that stays. Weights in 4 bits are whole only meanwhile.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sftlab.fastpath import mlp_ops
from sftlab.fastpath.dropout_bits import is_kept, project_dropped_, project_dropped_backward
from sftlab.fastpath.four_bit_weight import four_bit_above, four_bit_beside


class Form(NamedTuple):
    """The sizes and scales of linears that read one tensor, and how their weights are held.

    `far` outputs have gradients that are worked out before they are copied beside one another. The
    weights are in 4 bits where `block` and `kind` are given: see four_bit_weight.
    """

    sizes: list[int]
    scales: list[float]
    far: bool
    block: int | None = None
    kind: str = ""


def for_outputs(form: Form, held: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `wide`, and A with zeros behind it, [ranks, in + ranks].

    `held` is one matrix with W, s B to its right and A below it; its last block is 0. In 4 bits it
    is s B with zeros below it, [out + ranks, ranks], A with its zeros, and the tensors of every
    weight.
    """
    out = sum(form.sizes)
    if form.block is None:
        return held[0][:out], held[0][out:]
    b, a, *weights = held
    width = a.shape[1] - len(a)
    return four_bit_beside(weights, form.sizes, b[:out], width, form.block, form.kind), a


def for_gradients(
    form: Form, held: Sequence[torch.Tensor], gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `tall`, and s B with zeros below it, [out + ranks, ranks].

    `gradient` is there in the backward alone.
    """
    if form.block is None:
        width = held[0].shape[1] - len(held[0]) + sum(form.sizes)
        return held[0][:, :width], held[0][:, width:]
    b, a, *weights = held
    a = a[:, : a.shape[1] - len(a)]
    return four_bit_above(weights, form.sizes, a, form.block, form.kind, gradient), b


class JoinedProduct(torch.autograd.Function):
    """[x, h] [W, s B]^T with h = `factor` dropout(x) A^T: [rows, in] to [rows, out] of each layer.

    h comes of x with zeros beside it, and is written over them: Inductor copies the whole matrix
    where a product reads a part of it. x and h are kept apart: x is kept by what made it already,
    as attention keeps its output, or is a norm's output, which a compiled layer computes again.

    `tensors` are what `for_outputs` takes, and then each layer's A and B, whose gradients it
    returns. `kept` are dropout's bits.
    """

    @staticmethod
    def forward(
        ctx: object,
        x: torch.Tensor,
        kept: torch.Tensor | None,
        factor: float,
        form: Form,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        held, matrices = tensors[: -2 * len(form.sizes)], tensors[-2 * len(form.sizes) :]
        wide, a = for_outputs(form, held)
        width, rank = x.shape[1], len(matrices[0])
        beside = torch.cat([x, x.new_zeros(len(x), len(a))], 1)
        if kept is None:
            beside[:, width:] = h = beside @ a.t()
        else:
            project_dropped_(beside, a[:, :width], kept, rank, factor)
            h = beside[:, width:].clone()
        ctx.save_for_backward(x, h, kept, *held)
        ctx.form, ctx.rank, ctx.factor = form, rank, factor
        ctx.dtype = matrices[0].dtype
        return (beside @ wide.t()).split(form.sizes, 1)

    @staticmethod
    def backward(ctx: object, *gradients: torch.Tensor) -> tuple:
        x, h, kept, *held = ctx.saved_tensors
        form, rank, out = ctx.form, ctx.rank, sum(ctx.form.sizes)
        tall, b = for_gradients(form, held, gradients[0])
        if kept is None:
            if form.far:
                beside = mlp_ops.beside(list(gradients), len(tall))
            else:
                beside = torch.cat([*gradients, x.new_zeros(h.shape)], 1)
            into_h = beside @ b
            into_b = beside[:, :out].t() @ h
            into_a = into_h.t() @ x
            beside[:, out:] = into_h
            into_x = beside @ tall
        else:
            gradient = mlp_ops.beside(list(gradients), out) if form.far else torch.cat(gradients, 1)
            into_h = gradient @ b[:out] * ctx.factor
            into_b = gradient.t() @ h
            into_a = project_dropped_backward(into_h, x, kept, rank)
            into_x = gradient @ tall[:out]
            parts = zip(into_h.split(rank, 1), tall[out:].split(rank), kept, strict=False)
            for mine, a, bits in parts:
                into_x = into_x + torch.where(is_kept(bits), mine @ a, 0)
        found = adapter_gradients(into_a, into_b, rank, form, ctx.dtype)
        return into_x, None, None, None, *(None for _ in held), *found


def adapter_gradients(
    into_a: torch.Tensor, into_b: torch.Tensor, rank: int, form: Form, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Returns the gradients of each layer's A [rank, in] and B [out, rank], in turn.

    They are parts of those of all: `into_a` [ranks, in], and `into_b` [all out, ranks] for s B.
    """
    found = []
    parts = zip(into_a.split(rank), into_b.split(form.sizes), form.scales, strict=False)
    for i, (a, b, scale) in enumerate(parts):
        found.append(a.to(dtype))
        found.append(b[:, i * rank : (i + 1) * rank].to(dtype) * scale)
    return found
