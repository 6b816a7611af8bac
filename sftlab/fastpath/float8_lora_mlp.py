"""A decoder layer's MLP with fused LoRA over float8 weights as one function.

Its activation is rounded by the kernel that makes it, and so are the gradients of gate and up, each
where a product reads it beside LoRA's part. The activation is not kept for the backward.

Gradients are rounded in one pass, so their scale is known before: it is the most that they can be.
That is 2^5 times what they are, as it is found (SmolLM2; 2^9 at most), and e5m2 has the range.
"""

import torch

from sftlab.fastpath.float8 import float8_product
from sftlab.fastpath.float8_lora_ops import (
    gated_backward_in_float8,
    gated_down_in_float8,
    join_in_float8,
)
from sftlab.fastpath.joined_product import Form, adapter_gradients


class Float8LoraMlp(torch.autograd.Function):
    """down's [act, h] [W, s B]^T of act = f(gate) up: [rows, in] to [rows, out].

    `form` and the first `count` of `tensors` are those of gate and up, as Float8Input has them.
    `form_down` and the next tensors are down's. The last six are A and B of gate, up and down,
    whose gradients it returns.
    """

    @staticmethod
    def forward(
        ctx: object,
        x: torch.Tensor,
        tanh_gelu: bool,
        form: Form,
        form_down: Form,
        count: int,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        wide, tall, a, b, scale, numbers = tensors[:count]
        wide_down, tall_down, a_down, b_down, scale_down, numbers_down = tensors[count:-6]
        of_h, of_into_h, _, room_back, _ = numbers.split(1)
        of_h_down, of_into_h_down, room, _, reach = numbers_down.split(1)
        h = x @ a.t()
        joined = join_in_float8([x], h, of_h, False)
        gate, up = (float8_product(*joined, one, scale) for one in wide.split(form.sizes))
        y, h_down, steepest = gated_down_in_float8(
            gate, up, wide_down, a_down, scale_down, of_h_down, room, tanh_gelu
        )
        ctx.save_for_backward(
            x, h, gate, up, h_down, room_back * reach * steepest, tall, b, scale, of_into_h,
            tall_down, b_down, scale_down, of_into_h_down,
        )  # fmt: skip
        ctx.tanh_gelu, ctx.form, ctx.form_down = tanh_gelu, form, form_down
        ctx.ranks, ctx.dtype = (len(tensors[-6]), len(tensors[-2])), tensors[-6].dtype
        return y

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple:
        x, h, gate, up, h_down, larger, tall, b, scale, of_into_h, *down = ctx.saved_tensors
        size, (rank, rank_down) = gate.shape[1], ctx.ranks
        gate8, up8, row_scale, into_h, into_b, into_a_down = gated_backward_in_float8(
            gradient, gate, up, h, b, of_into_h, *down, larger, rank, rank_down, ctx.tanh_gelu
        )
        into_x = float8_product(gate8, row_scale, tall[:, :size], scale)
        into_x = into_x + float8_product(up8, row_scale, tall[:, size:], scale)
        into_a, into_b_down = into_h.t() @ x, gradient.t() @ h_down
        found = adapter_gradients(into_a, into_b, rank, ctx.form, ctx.dtype)
        found += adapter_gradients(into_a_down, into_b_down, rank_down, ctx.form_down, ctx.dtype)
        return into_x, None, None, None, None, *[None] * 12, *found
