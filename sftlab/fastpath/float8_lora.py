"""Fused LoRA on frozen float8 linears: h stands beside x in float8, and s B beside W.

One product gives x W^T + s h B^T, and another one the gradient of x. In them h, its gradient, A and
B are in float8 like all else; A and B are the sum of two float8 numbers where there is room. h
itself, and the gradients of A and B, are of bfloat16 products.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from peft.tuners import lora
from torch import nn

from sftlab.fastpath.float8 import FORWARD, FrozenFloat8Linear, float8_product, over
from sftlab.fastpath.float8_lora_ops import join_in_float8, stand_twice
from sftlab.fastpath.float8_mlp_ops import LARGEST_SIZE, side_by_side
from sftlab.fastpath.joined_product import Form
from sftlab.fastpath.lora_products import LARGEST_SHARED_RANK, SharedInput, Views, padded
from sftlab.fastpath.many_copies import copy_all, scatter

# How much larger than a row h may be that is not known yet when the row is rounded, unless B wants
# more. It costs digits of elements that are a thousandth of the largest one.
HEADROOM = 32.0
# How much more than exact numbers what is rounded to e5m2, and added up roughly, may be.
ROUNDED = 1.25


class Float8Input(SharedInput):
    """Layers with frozen float8 weights that read one tensor, without dropout.

    `held` are W beside s B, [out, in + ranks], and W^T beside A^T, [in, out + ranks], in float8; A
    [ranks, in] and s B [out, ranks] in bfloat16; the weights' scale, for every column of either
    product; and the five numbers of `_numbers`. The weights are views of the first two, and their
    parameters keep no memory.

    Where `ranks` are at least twice those of all layers, A and s B stand there twice: in float8 as
    what they are rounded to, and what that is away from them.

    `weight_reach` [1] is the norm of W's longest column, in numbers of float8.
    """

    in_float8 = True
    weight_reach: torch.Tensor

    def tensors(self) -> list[torch.Tensor]:
        """Returns what is held."""
        return list(self.held)

    def is_ready(self, x: torch.Tensor) -> bool:
        """Whether its layers are ready for x, and multiply in float8."""
        rounds = all(layer.base_layer.rounds_inputs for layer in self.layers)
        return rounds and super().is_ready(x)

    def _outputs(self, x: torch.Tensor) -> list[torch.Tensor]:
        rows = x.reshape(-1, self.layers[0].in_features)
        matrices = [matrix for layer in self.layers for matrix in layer.matrices]
        found = Float8JoinedProduct.apply(rows, self.form, *self.tensors(), *matrices)
        return [part.unflatten(0, x.shape[:-1]) for part in found]

    def forget(self, weights: Mapping[nn.Parameter, torch.Tensor]) -> None:
        """Be as before the decoder's first forward, with the frozen weights that are given.

        Where what is given keeps no memory, they were held before already, and still are.
        """
        super().forget(weights)
        for layer in self.layers:
            if any(layer.base_layer.weight.stride()):
                layer.base_layer.held = None

    @torch.inference_mode(False)
    def hold_weights(self) -> None:
        """Make the frozen weights views of what is held, unless they are.

        A first forward in inference mode holds what trainings can use too.
        """
        linears = [layer.base_layer for layer in self.layers]
        device = linears[0].weight.device
        if self.holds_these_ranks() and self.held[0].device == device and linears[0].held:
            return
        stored, ranks = [linear.stored() for linear in linears], self.columns()
        width, size = linears[0].in_features, sum(linear.out_features for linear in linears)
        scale = stored[0][2][:, :1].repeat(1, max(size, width))
        wide = torch.zeros(size, width + ranks, dtype=FORWARD, device=device)
        tall = torch.zeros(width, size + ranks, dtype=FORWARD, device=device)
        a = torch.zeros(ranks, width, dtype=self.dtype, device=device)
        self.hold(wide, tall, a, a.new_zeros(size, ranks), scale, scale.new_ones(5))
        begin = 0
        for linear, (weight, weight_t, _) in zip(linears, stored, strict=True):
            end = begin + linear.out_features
            mine = wide[begin:end, : linear.in_features], tall[:, begin:end]
            mine[0].view(torch.uint8).copy_(weight.view(torch.uint8))
            mine[1].view(torch.uint8).copy_(weight_t.view(torch.uint8))
            linear.held, begin = mine, end
            linear.weight.data = linear.weight.data.new_zeros(()).expand(linear.weight.shape)
        self.weight_reach = largest_norm(tall[:, :size])

    def columns(self) -> int:
        """Returns the columns beside the input."""
        return columns_beside(sum(layer.rank for layer in self.layers))

    def find_views(self) -> Views:
        """Returns where each layer's tensors are in what is held."""
        return Views(self.held, *self.parts(self.held[2], self.held[3]), [])

    @staticmethod
    def after_copies(groups: Sequence["Float8Input"]) -> None:
        """Round A and s B to float8 beside the weights, for all groups of a size at once.

        As in `parts`, it writes to tensors with versions of their own.
        """
        alike = defaultdict(list)
        for group in groups:
            if group.held is not None:
                shapes = group.held[0].shape, group.held[1].shape
                held = [one.data for one in (*group.held, group.weight_reach)]
                alike[*shapes, sum(group.held_ranks)].append(held)
        for (_, _, ranks), held in alike.items():
            wide, tall, a, b, scales, numbers, reach = zip(*held, strict=True)
            twice = stand_twice(ranks, len(a[0]))
            if twice:
                again = [x[ranks:][:ranks] for x in a] + [x[:, ranks:][:, :ranks] for x in b]
                copy_all(again, [x[:ranks] for x in a] + [x[:, :ranks] for x in b])
            a_all = torch.stack([x[:ranks] for x in a]).float()
            b_all = torch.stack([x[:, :ranks] for x in b]).float()
            scale = torch.stack(scales)[:, :, :1]
            found = _numbers(a_all, b_all, scale, torch.cat(reach))
            torch._foreach_copy_(list(numbers), list(found))
            of_h, of_into_h, *_ = found.view(-1, 5, 1, 1).unbind(1)
            for into, whole in (
                (wide, b_all / (of_h * scale)),
                (tall, a_all.mT / (of_into_h * scale)),
            ):
                copies = _rounded(whole, twice)
                begin = into[0].shape[1] - len(a[0])
                scatter(copies, [one[:, begin:][:, : copies.shape[2]] for one in into])


def columns_beside(ranks: int) -> int:
    """Returns the columns beside an input of layers that have so many ranks in all."""
    return padded(2 * ranks if 2 * ranks <= LARGEST_SHARED_RANK else ranks)


def _rounded(whole: torch.Tensor, twice: bool) -> torch.Tensor:
    """Returns [groups, rows, ranks] in float8, beside it what that is away from it if `twice`."""
    rounded = over(whole, whole.new_ones(()), FORWARD)
    return side_by_side(rounded, (whole - rounded.float()).to(FORWARD)) if twice else rounded


def largest_norm(x: torch.Tensor) -> torch.Tensor:
    """Returns the norm of the longest row of a float8 matrix, [1], some rows at a time."""
    each = [rows.float().norm(dim=1).amax() for rows in x.split(1024)]
    return torch.stack(each).amax(0, keepdim=True)


def _numbers(
    a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, weight_reach: torch.Tensor
) -> torch.Tensor:
    """Returns what h and its gradient are multiplied with in float8, and how large rows may be.

    A product has one scale for W and B, so B [groups, out, ranks] is divided by the first number,
    and A [groups, ranks, in] by the second; `scale` [groups, 1, 1] is the weights'. h is at most
    the size of its row times that of A's (Cauchy and Schwarz), and so becomes at most HEADROOM
    times the largest element of its row, or more, so that B is within the numbers of e4m3. A fills
    these: gradients have the range of e5m2. The third number is how much larger than its row h may
    be, the fourth the same of its gradient. The fifth times a joined gradient's norm is the most
    that the product makes of it, by Cauchy and Schwarz again, with the norms of W's columns, whose
    largest `weight_reach` [groups] is, and of A's. [groups, 5] in all.
    """
    largest, tiny = torch.finfo(FORWARD).max, torch.finfo(torch.float32).tiny
    scale, of_a, of_b = scale.view(-1), a.abs().amax((1, 2)), b.abs().amax((1, 2))
    parallel = a.norm(dim=2).amax(1) * a.shape[2] ** 0.5
    # with A all zeros h is zero too
    wanted = torch.where(parallel > 0, HEADROOM / parallel.clamp(min=tiny), 1.0)
    of_h = torch.maximum(wanted, of_b / (largest * scale))
    of_into_h = (of_a / (largest * scale)).clamp(min=tiny)
    room_back = 1 + of_into_h * b.norm(dim=1).amax(1) * b.shape[1] ** 0.5
    of_a = (a / of_into_h.view(-1, 1, 1)).norm(dim=1).amax(1)
    reach = ROUNDED * torch.hypot(scale * weight_reach, of_a)
    return torch.stack([of_h, of_into_h, HEADROOM * of_h / wanted, room_back, reach], 1)


def why_not(layer: lora.LoraLayer, dtype: torch.dtype) -> str | None:
    """Returns why LoRA cannot be fused with a frozen float8 linear; None if it can.

    `dtype` is that of the products' outputs.
    """
    base = layer.get_base_layer()
    if dtype != torch.bfloat16:
        return f"products in float8 give bfloat16, and the others {dtype}"
    if max(base.in_features, base.out_features) > LARGEST_SIZE:
        return f"a float8 linear has more than {LARGEST_SIZE:,} inputs or outputs"
    if any(isinstance(one, nn.Dropout) for one in layer.lora_dropout.values()):
        return "in float8 LoRA with dropout stays peft's"
    return None


def share_a_scale(layers: Sequence[lora.LoraLayer]) -> bool:
    """Whether frozen weights can be one matrix: a product in float8 has one scale for all of it."""
    linears = [layer.base_layer for layer in layers]
    scales = {
        float(one.scale[0, 0]) if isinstance(one, FrozenFloat8Linear) else None for one in linears
    }
    return len(scales) == 1


class Float8JoinedProduct(torch.autograd.Function):
    """[x, h] [W, s B]^T in float8 with h = x A^T: [rows, in] to [rows, out] of each layer.

    `tensors` are what Float8Input holds, and then each layer's A and B, whose gradients it returns.
    """

    @staticmethod
    def forward(
        ctx: object, x: torch.Tensor, form: Form, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        wide, tall, a, b, scale, numbers = tensors[: -2 * len(form.sizes)]
        of_h, of_into_h, *_ = numbers.split(1)
        h = x @ a.t()
        joined = join_in_float8([x], h, of_h, False)
        ctx.save_for_backward(x, h, tall, b, scale, of_into_h)
        ctx.form, ctx.rank, ctx.dtype = form, len(tensors[-2]), tensors[-2].dtype
        return float8_product(*joined, wide, scale).split(form.sizes, 1)

    @staticmethod
    def backward(ctx: object, *gradients: torch.Tensor) -> tuple:
        x, h, tall, b, scale, of_into_h = ctx.saved_tensors
        form = ctx.form
        parts = [g @ one for g, one in zip(gradients, b.split(form.sizes), strict=True)]
        into_h = sum(parts[1:], parts[0])
        joined = join_in_float8(list(gradients), into_h, of_into_h, True)
        into_x = float8_product(*joined, tall, scale)
        into_a = into_h.t() @ x
        found = adapter_gradients(into_a, gradients, h, form, ctx.rank, ctx.dtype)
        return into_x, None, *[None] * 6, *found


def adapter_gradients(
    into_a: torch.Tensor,
    gradients: Sequence[torch.Tensor],
    h: torch.Tensor,
    form: Form,
    rank: int,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """Returns the gradients of each layer's A [rank, in] and B [out, rank], in turn.

    `into_a` [ranks, in] is that of all A, `gradients` are those of the layers' outputs [rows, out],
    h [rows, ranks] is what A makes of their input.
    """
    found = []
    for i, (gradient, scale) in enumerate(zip(gradients, form.scales, strict=True)):
        mine = slice(i * rank, (i + 1) * rank)
        found.append(into_a[mine].to(dtype))
        found.append((gradient.t() @ h[:, mine]).to(dtype) * scale)
    return found
