"""LoRA and its frozen linear as one matrix product, for linears that share their input too.

peft computes x W^T and s (x A^T) B^T and adds them. Here h = x A^T stands beside x and s B beside
W, so that one product gives the sum. W and A are below one another too: another product gives the
gradient of x. One matrix holds all of them, and the frozen weights are views of it. Linears that
read the same tensor (q, k and v; gate and up) are one such product, B on a block diagonal.
"""

from collections.abc import Mapping, Sequence

import torch
from peft.tuners import lora
from torch import nn

from sftlab.fastpath import mlp_ops
from sftlab.fastpath.dropout_bits import (
    dropout_bits,
    is_kept,
    kept_share,
    project_dropped_,
    project_dropped_backward,
)

# products are fast where the rank is padded to this
RANK_MULTIPLE = 64
# more columns beside the input than this cost more than sharing it saves (an estimate)
LARGEST_SHARED_RANK = 128


class LoraProduct(lora.Linear):
    """peft's LoRA layer, computed in one product with the layers that share its input.

    It falls back to peft's own forward before the decoder's first one, while adapters are merged,
    disabled or chosen by row, where a hook looks at the frozen linear, and where its products have
    another dtype than its weight.
    """

    together: "SharedInput"
    place: int

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """Returns x W^T + s dropout(x) A^T B^T: [..., in] to [..., out]."""
        if args or kwargs or not self.together.is_ready(x):
            return lora.Linear.forward(self, x, *args, **kwargs)
        weight = self.base_layer.weight
        y = self.together.output(self.place, x.to(weight.dtype))
        return y if self.base_layer.bias is None else y + self.base_layer.bias.to(weight.dtype)

    @property
    def adapts(self) -> bool:
        """Whether it adds its one adapter to a frozen linear that nobody watches."""
        if self._disable_adapters or self.merged_adapters or self.base_layer._forward_hooks:
            return False
        return self.has_one_adapter and self.active_adapters == list(self.lora_A)

    @property
    def has_one_adapter(self) -> bool:
        """Whether no second adapter was added."""
        return len(self.lora_A) == 1

    @property
    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, in] and B [out, rank]."""
        (a,), (b,) = self.lora_A.values(), self.lora_B.values()
        return a.weight, b.weight

    @property
    def rank(self) -> int:
        """The rank of its adapter."""
        (rank,) = self.r.values()
        return rank

    @property
    def scale(self) -> float:
        """What the LoRA update is multiplied with."""
        (scale,) = self.scaling.values()
        return scale

    @property
    def dropped(self) -> float:
        """The probability with which dropout zeroes an element of LoRA's input."""
        (dropout,) = self.lora_dropout.values()
        return dropout.p if isinstance(dropout, nn.Dropout) else 0.0

    @property
    def kind(self) -> tuple:
        """What layers of one product have in common."""
        return self.in_features, self.base_layer.weight.dtype, self.rank, self.dropped


def padded(rank: int) -> int:
    """Returns the columns beside an input of layers that have so many ranks in all."""
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


class SharedInput:
    """Layers that read one tensor. The first one that is asked computes the outputs of all.

    `joined` [out + rank, in + rank] holds W, s B to its right and A below it; its last block is 0.
    `far` outputs have gradients that are worked out before they are copied beside one another.
    """

    def __init__(self, layers: Sequence[LoraProduct], far: bool = False) -> None:
        self.layers, self.far = tuple(layers), far
        self.joined: torch.Tensor | None = None
        self._x: torch.Tensor | None = None
        self._waiting: list[torch.Tensor | None] = []

    def is_ready(self, x: torch.Tensor) -> bool:
        """Whether the decoder has begun, every layer adapts, and x's products have W's dtype."""
        if self.joined is None or not all(one.adapts for one in self.layers):
            return False
        for layer in self.layers:
            dtype = layer.matrices[0].dtype
            if torch.is_autocast_enabled(x.device.type):
                dtype = torch.get_autocast_dtype(x.device.type)
            if dtype != layer.base_layer.weight.dtype:
                return False
        return True

    def output(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """Returns the output of the layer at `place` for x, without a bias."""
        if len(self.layers) == 1:
            return self._outputs(x)[0]
        if self._x is not x or self._waiting[place] is None:
            self._x, self._waiting = x, self._outputs(x)
        y, self._waiting[place] = self._waiting[place], None
        if all(one is None for one in self._waiting):
            self._x = None
        return y

    def _outputs(self, x: torch.Tensor) -> list[torch.Tensor]:
        layers, first = self.layers, self.layers[0]
        rows, kept, factor = x.reshape(-1, first.in_features), None, 1.0
        if first.training and first.dropped:
            seed = torch.randint(2**62, (1,), device=x.device)
            kept = dropout_bits(seed, len(layers), *rows.shape, first.dropped)
            factor = 1 / kept_share(first.dropped)
        sizes = [layer.out_features for layer in layers]
        scales = [layer.scale for layer in layers]
        matrices = [matrix for layer in layers for matrix in layer.matrices]
        form = (sizes, scales, self.far)
        found = _Product.apply(rows, self.joined, kept, factor, form, *matrices)
        return [part.unflatten(0, x.shape[:-1]) for part in found]

    def forget(self, weights: Mapping[nn.Parameter, torch.Tensor]) -> None:
        """Be as before the decoder's first forward, with the frozen weights that are given."""
        self.joined, self._x, self._waiting = None, None, []
        for layer in self.layers:
            layer.base_layer.weight.data = weights[layer.base_layer.weight]

    def hold_weights(self) -> None:
        """Make the frozen weights views of `joined`, unless they are."""
        first = self.layers[0].base_layer.weight
        out, rank = sum(layer.out_features for layer in self.layers), self._columns()
        weights = [layer.base_layer.weight for layer in self.layers]
        if self.joined is not None and all(
            weight.data_ptr() == view.data_ptr()
            for weight, view in zip(weights, self._weight_views(), strict=True)
        ):
            return
        self.joined = first.new_zeros(out + rank, first.shape[1] + rank)
        for weight, view in zip(weights, self._weight_views(), strict=True):
            view.copy_(weight.data)
            weight.data = view

    def _columns(self) -> int:
        return padded(sum(layer.rank for layer in self.layers))

    def _weight_views(self) -> list[torch.Tensor]:
        width = self.layers[0].in_features
        sizes = [layer.out_features for layer in self.layers]
        return list(self.joined[: sum(sizes), :width].split(sizes))

    def lora_views(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Returns where `joined` has each layer's A [rank, in] and s B [out, rank]."""
        width, rank = self.layers[0].in_features, self.layers[0].rank
        sizes = [layer.out_features for layer in self.layers]
        below = self.joined[sum(sizes) :, :width].split(rank)[: len(sizes)]
        beside = self.joined[: sum(sizes), width:].split(sizes)
        blocks = [block[:, i * rank : (i + 1) * rank] for i, block in enumerate(beside)]
        return list(below), blocks


@torch.no_grad()
def copy_matrices(groups: Sequence[SharedInput]) -> None:
    """Copy what LoRA trains to where the products read it; before every forward."""
    into, a, b, scales = ([], []), [], [], []
    for group in groups:
        if not all(layer.has_one_adapter for layer in group.layers):
            continue
        group.hold_weights()
        for views, found in zip(into, group.lora_views(), strict=True):
            views.extend(found)
        for layer in group.layers:
            mine = layer.matrices
            a.append(mine[0].data)
            b.append(mine[1].data)
            scales.append(layer.scale)
    if not a:
        return
    torch._foreach_copy_(into[0], a)
    torch._foreach_copy_(into[1], torch._foreach_mul(b, scales))


class _Product(torch.autograd.Function):
    """[x, h] [W, s B]^T with h = `factor` dropout(x) A^T: [rows, in] to [rows, out] of each layer.

    `joined` holds W, A and s B; `matrices` are each layer's A and B, whose gradients it returns.
    `kept` are dropout's bits.
    """

    @staticmethod
    def forward(
        ctx: object,
        x: torch.Tensor,
        joined: torch.Tensor,
        kept: torch.Tensor | None,
        factor: float,
        form: tuple[list[int], list[float], bool],
        *matrices: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        sizes, ctx.scales, ctx.far = form
        out, width, rank = sum(sizes), x.shape[1], len(matrices[0])
        beside = torch.cat([x, x.new_zeros(len(x), joined.shape[1] - width)], 1)
        if kept is None:
            beside[:, width:] = beside @ joined[out:].t()
        else:
            project_dropped_(beside, joined[out:, :width], kept, rank, factor)
        ctx.save_for_backward(beside, joined, kept)
        ctx.rank, ctx.factor, ctx.sizes = rank, factor, sizes
        ctx.dtype = matrices[0].dtype
        return (beside @ joined[:out].t()).split(sizes, 1)

    @staticmethod
    def backward(ctx: object, *gradients: torch.Tensor) -> tuple:
        both, joined, kept = ctx.saved_tensors
        out, rank = sum(ctx.sizes), ctx.rank
        width = both.shape[1] - len(joined) + out
        x, h = both[:, :width], both[:, width:]
        if kept is None:
            if ctx.far:
                beside = mlp_ops.beside(list(gradients), len(joined))
            else:
                beside = torch.cat([*gradients, x.new_zeros(h.shape)], 1)
            into_h = beside @ joined[:, width:]
            into_b = beside[:, :out].t() @ h
            into_a = into_h.t() @ x
            beside[:, out:] = into_h
            into_x = beside @ joined[:, :width]
        else:
            gradient = mlp_ops.beside(list(gradients), out) if ctx.far else torch.cat(gradients, 1)
            into_h = gradient @ joined[:out, width:] * ctx.factor
            into_b = gradient.t() @ h
            into_a = project_dropped_backward(into_h, x, kept, rank)
            into_x = gradient @ joined[:out, :width]
            parts = zip(into_h.split(rank, 1), joined[out:, :width].split(rank), kept, strict=False)
            for mine, a, bits in parts:
                into_x = into_x + torch.where(is_kept(bits), mine @ a, 0)
        found = adapter_gradients(into_a, into_b, rank, ctx.sizes, ctx.scales, ctx.dtype)
        return into_x, None, None, None, None, *found


def adapter_gradients(
    into_a: torch.Tensor,
    into_b: torch.Tensor,
    rank: int,
    sizes: Sequence[int],
    scales: Sequence[float],
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """Returns the gradients of each layer's A [rank, in] and B [out, rank], in turn.

    They are parts of those of all: `into_a` [ranks, in], and `into_b` [all out, ranks] for s B.
    """
    found = []
    parts = zip(into_a.split(rank), into_b.split(sizes), scales, strict=False)
    for i, (a, b, scale) in enumerate(parts):
        found.append(a.to(dtype))
        found.append(b[:, i * rank : (i + 1) * rank].to(dtype) * scale)
    return found
