"""LoRA and its frozen linear as one matrix product, for linears that share their input too.

peft computes x W^T and s (x A^T) B^T and adds them. Here h = x A^T stands beside x and s B beside
W, so that one product gives the sum. W and A are below one another too: another product gives the
gradient of x. One matrix holds all of them, and whole frozen weights are views of it (for those in
4 bits see four_bit_lora.py). Linears that read the same tensor (q, k and v; gate and up) are one
such product, B on a block diagonal.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from sftlab.fastpath import one_adapter
from sftlab.fastpath.dropout_bits import dropout_bits, kept_share
from sftlab.fastpath.joined_product import Form, JoinedProduct
from sftlab.fastpath.many_copies import copy_all

# products are fast where the rank is padded to this
RANK_MULTIPLE = 64
# more columns beside the input than this cost more than sharing it saves (an estimate)
LARGEST_SHARED_RANK = 128


class LoraProduct(nn.Module):
    """What a LoRA layer is computed by, in one product with the layers that share its input.

    It stands before peft's class of the layer. It falls back to that class's forward before the
    decoder's first one, while adapters are merged, disabled or chosen by row, where a hook looks at
    the frozen linear, and where its products have another dtype than its weight.
    """

    together: "SharedInput"
    place: int

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """Returns x W^T + s dropout(x) A^T B^T: [..., in] to [..., out]."""
        if args or kwargs or not self.together.is_ready(x):
            return super().forward(x, *args, **kwargs)
        dtype, bias = self.together.dtype, self.base_layer.bias
        y = self.together.output(self.place, x.to(dtype))
        return y if bias is None else y + bias.to(dtype)

    adapts = property(one_adapter.adapts)
    has_one_adapter = property(one_adapter.has_one_adapter)
    matrices = property(one_adapter.matrices)
    rank = property(one_adapter.rank)
    scale = property(one_adapter.scale)
    dropped = property(one_adapter.dropped)

    @property
    def kind(self) -> tuple:
        """What layers of one product have in common."""
        base = self.base_layer
        state = getattr(base.weight, "quant_state", None)
        if state is None:
            frozen = (base.weight.dtype,)
        else:
            frozen = (base.compute_dtype, state.blocksize, state.quant_type, state.nested)
        return self.in_features, self.rank, self.dropped, *frozen


def padded(rank: int) -> int:
    """Returns the columns beside an input of layers that have so many ranks in all."""
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


class SharedInput:
    """Layers that read one tensor. The first one that is asked computes the outputs of all.

    `held` is one matrix [out + ranks, in + ranks] with W, s B to its right and A below it; its last
    block is 0. It is None before the decoder's first forward. `far` is that of Form.
    """

    # whether its products are in float8
    in_float8 = False

    def __init__(self, layers: Sequence[LoraProduct], far: bool = False) -> None:
        self.layers, self.far = tuple(layers), far
        self.held: tuple[torch.Tensor, ...] | None = None
        self.held_ranks: list[int] = []
        self._x: torch.Tensor | None = None
        self._waiting: list[torch.Tensor | None] = []
        self._views: Views | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its products."""
        return self.layers[0].base_layer.weight.dtype

    @property
    def form(self) -> Form:
        """What its product has to know beside tensors."""
        sizes = [layer.out_features for layer in self.layers]
        return Form(sizes, [layer.scale for layer in self.layers], self.far, *self.rounding)

    @property
    def rounding(self) -> tuple[int | None, str]:
        """How its weights were rounded: weights a block and the kind of 4 bits."""
        return None, ""

    def tensors(self) -> list[torch.Tensor]:
        """Returns what its product takes the frozen weights and LoRA's copies from."""
        return list(self.held)

    def is_ready(self, x: torch.Tensor) -> bool:
        """Whether the decoder has begun, every layer adapts, and products have the right dtype."""
        if self.held is None or not all(one.adapts for one in self.layers):
            return False
        kind = x.device.type
        return all(one_adapter.product_dtype(one, kind) == self.dtype for one in self.layers)

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
        matrices = [matrix for layer in layers for matrix in layer.matrices]
        found = JoinedProduct.apply(rows, kept, factor, self.form, *self.tensors(), *matrices)
        return [part.unflatten(0, x.shape[:-1]) for part in found]

    def forget(self, weights: Mapping[nn.Parameter, torch.Tensor]) -> None:
        """Be as before the decoder's first forward, with the frozen weights that are given."""
        self.held, self._views, self._x, self._waiting = None, None, None, []
        for layer in self.layers:
            layer.base_layer.weight.data = weights[layer.base_layer.weight]

    def hold_weights(self) -> None:
        """Make the frozen weights views of what is held, unless they are."""
        weights = [layer.base_layer.weight for layer in self.layers]
        addresses = [weight.data_ptr() for weight in weights]
        if self.holds_these_ranks() and addresses == self.views().weights:
            return
        first = weights[0]
        out, ranks = sum(layer.out_features for layer in self.layers), self.columns()
        self.hold(first.data.new_zeros(out + ranks, first.shape[1] + ranks))
        for weight, view in zip(weights, self._weight_views(), strict=True):
            view.copy_(weight.data)
            weight.data = view

    def hold(self, *matrices: torch.Tensor) -> None:
        """Hold matrices that have room for adapters of today's ranks."""
        self.held, self.held_ranks = matrices, [layer.rank for layer in self.layers]

    def holds_these_ranks(self) -> bool:
        """Whether what is held was made for adapters of today's ranks."""
        return self.held is not None and self.held_ranks == [layer.rank for layer in self.layers]

    @staticmethod
    def after_copies(groups: Sequence["SharedInput"]) -> None:
        """Make what else products take of the copies of LoRA's matrices."""

    def columns(self) -> int:
        """Returns the columns of all A matrices, padded."""
        return padded(sum(layer.rank for layer in self.layers))

    def views(self) -> "Views":
        """Returns where each layer's tensors are in what is held; found once for what that is."""
        if self._views is None or self._views.held is not self.held:
            self._views = self.find_views()
        return self._views

    def find_views(self) -> "Views":
        """Returns where each layer's tensors are in what is held."""
        (joined,), width, out = self.held, self.layers[0].in_features, sum(self.form.sizes)
        weights = [view.data_ptr() for view in self._weight_views()]
        return Views(self.held, *self.parts(joined[out:, :width], joined[:out, width:]), weights)

    def _weight_views(self) -> list[torch.Tensor]:
        width, sizes = self.layers[0].in_features, self.form.sizes
        return list(self.held[0][: sum(sizes), :width].split(sizes))

    def parts(
        self, a: torch.Tensor, b: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Returns each layer's part of A [ranks, in] and of the block diagonal s B [out, ranks].

        They have versions of their own: a reference's forward copies the same once more, before the
        backward of the forward ahead of it.
        """
        sizes, rank = self.form.sizes, self.layers[0].rank
        a, b = a.data, b.data
        blocks = [b[:, i * rank : (i + 1) * rank] for i, b in enumerate(b.split(sizes))]
        return list(a.split(rank)[: len(sizes)]), blocks


class Views(NamedTuple):
    """Where a SharedInput's layers are in what it holds.

    Each has its A [rank, in] and s B [out, rank], and its frozen weight at an address, where that
    is a view too.
    """

    held: tuple[torch.Tensor, ...]
    a: list[torch.Tensor]
    b: list[torch.Tensor]
    weights: list[int]


@torch.no_grad()
def copy_matrices(groups: Sequence[SharedInput]) -> None:
    """Copy what LoRA trains to where the products read it; before every forward."""
    into_a, into_b, a, b, scales = [], [], [], [], []
    for group in groups:
        if not all(layer.has_one_adapter for layer in group.layers):
            continue
        group.hold_weights()
        views = group.views()
        into_a.extend(views.a)
        into_b.extend(views.b)
        for layer in group.layers:
            mine = layer.matrices
            a.append(mine[0].data)
            b.append(mine[1].data)
            scales.append(layer.scale)
    if not a:
        return
    copy_all([*into_a, *into_b], [*a, *b], [1.0] * len(a) + scales)
    for kind in {type(group) for group in groups}:
        kind.after_copies([group for group in groups if type(group) is kind])
