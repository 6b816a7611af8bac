"""A decoder layer's MLP with fused LoRA over float8 weights as one function.

Its activation is rounded by the kernel that makes it, and so are the gradients of gate and up, each
where a product reads it beside LoRA's part. The activation is not kept for the backward.
"""

import torch

from sftlab.fastpath.float8 import float8_product
from sftlab.fastpath.float8_lora import adapter_gradients
from sftlab.fastpath.float8_lora_ops import fill_ranks_, join_in_float8
from sftlab.fastpath.float8_mlp_ops import gated_backward_to_float8_, gated_to_float8
from sftlab.fastpath.joined_product import Form


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
        of_h, of_into_h, _, room_back = numbers.split(1)
        of_h_down, of_into_h_down, room, _ = numbers_down.split(1)
        h = x @ a.t()
        joined = join_in_float8([x], h, of_h, False)
        gate, up = (float8_product(*joined, one, scale) for one in wide.split(form.sizes))
        act8, act_scale, act = gated_to_float8(gate, up, tanh_gelu, True, len(a_down), room)
        h_down = act @ a_down.t()
        fill_ranks_(h_down, of_h_down, act_scale, act8)
        ctx.save_for_backward(
            x, h, gate, up, h_down, tall, b, scale, of_into_h, room_back,
            tall_down, b_down, scale_down, of_into_h_down,
        )  # fmt: skip
        ctx.tanh_gelu, ctx.form, ctx.form_down = tanh_gelu, form, form_down
        ctx.ranks, ctx.dtype = (len(tensors[-6]), len(tensors[-2])), tensors[-6].dtype
        return float8_product(act8, act_scale, wide_down, scale_down)

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple:
        x, h, gate, up, h_down, tall, b, scale, of_into_h, room_back, *down = ctx.saved_tensors
        tall_down, b_down, scale_down, of_into_h_down = down
        size, (rank, rank_down) = gate.shape[1], ctx.ranks
        into_h_down = gradient @ b_down
        joined = join_in_float8([gradient], into_h_down, of_into_h_down, True)
        # its gradient; then the activation itself, in its place
        act = float8_product(*joined, tall_down, scale_down)
        gate8, gate_scale, up8, up_scale, into_gate, into_up = gated_backward_to_float8_(
            act, gate, up, ctx.tanh_gelu, True, True, b.shape[1], room_back
        )
        into_h = into_gate @ b[:size] + into_up @ b[size:]
        fill_ranks_(into_h, of_into_h, up_scale, up8)
        into_x = float8_product(gate8, gate_scale, tall[:, :size], scale)
        into_x = into_x + float8_product(up8, up_scale, tall[:, size:], scale)
        into_ys = [into_gate, into_up]
        found = adapter_gradients(into_h.t() @ x, into_ys, h, ctx.form, rank, ctx.dtype)
        found += adapter_gradients(
            into_h_down.t() @ act, [gradient], h_down, ctx.form_down, rank_down, ctx.dtype
        )
        return into_x, None, None, None, None, *[None] * 12, *found
