"""How much does a decoder layer of any family keep for its backward? Measured, not worked out.

The model with its adapter runs forward and backward on fake tensors: they have shapes and dtypes,
and no numbers. What autograd saves is counted layer by layer, and what is alive at once. Layers
that are alike are run once. Compiled layers are cut as inductor's partitioner cuts them.
Recurrences are those that run on this machine: in torch where their package is missing.
"""

import contextlib
import re
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers import PreTrainedModel

from sftlab.data.tiles import TILE
from sftlab.fastpath.compile_layers import decoder_layers
from sftlab.fastpath.experts import GROUPED
from sftlab.fastpath.experts_lora import factor_experts
from sftlab.fastpath.packed_mixers import pack_mixers
from sftlab.fastpath.recomputed_norms import recompute_norms
from sftlab.models.layers import decoder_of
from sftlab.models.mixers import packed_mixers, without_kernels
from sftlab.models.without_numbers import NOT_WITHOUT_NUMBERS
from sftlab.planning.live_memory import LiveMemory, SavedTensors

ROWS = 2
# what a model may raise that does not run on fake tensors
_NOT_ON_FAKE = (*NOT_WITHOUT_NUMBERS, AssertionError)
# what torch.compiler.disable was told
_REASON = re.compile(r"\(reason: (?!None)(.*?)\)")


class Rows(NamedTuple):
    """What is run: rows of `mean` tokens, the longest of `longest`, packed or padded to it.

    A layer's own state may be computed of packed rows side by side, each padded to the longest.
    """

    mean: int
    longest: int
    packed: bool

    @property
    def tokens(self) -> int:
        """Tokens of a row as the model sees them."""
        return self.mean if self.packed else self.longest


class Measured(NamedTuple):
    """Bytes a token: of a decoder layer on average, of the one that keeps most, outside of all.

    `again` are those of a layer that are computed again instead of kept, on average. `working` is
    what is alive at once beside what is kept, of an uncompiled layer. `operations` is how many of
    torch's operations a layer takes forward and backward, 0 where all are compiled, and `adapters`
    how many modules of a layer have LoRA, both on average. `recurrent` layers carry a state from
    token to token.
    """

    kept: float
    largest: float
    outside: float
    again: float
    working: float
    operations: float
    adapters: float
    recurrent: bool


class _Counted(NamedTuple):
    """Bytes of one run: kept by each layer, kept outside of them, working; and operations."""

    layers: list[int]
    outside: int
    working: int
    operations: int


def measured(
    model: PreTrainedModel,
    base: PreTrainedModel,
    rows: Rows,
    casts: bool,
    compiled: bool,
    recomputes_norms: bool = False,
) -> Measured:
    """Returns what the layers of a model on the meta device take for each token.

    `model` is `base` with an adapter, or itself. `casts` is autocast to 16 bits. With
    `recomputes_norms` compiled layers compute their norms again in the backward. The model is of no
    use afterwards. Raises ValueError for a model that does not run without numbers, and for LoRA on
    experts that peft adds to a copy of their weights.
    """
    if left := factor_experts(model):
        raise ValueError(
            f"no plan is made for LoRA on these experts, since {', '.join(left)}: leave out "
            "lora_target_parameters"
        )
    mixers = bool(packed_mixers(base))
    try:
        with FakeTensorMode(), without_kernels(base), _gpu_dropout(model):
            _without_numbers(model)
            _prepare(base, rows)
            alike = _alike(base)
            batches = [_batch(rows, count, mixers) for count in (ROWS, 2 * ROWS)]
            one, two = (_run(model, base, batch, casts, alike) for batch in batches)
            layers = [b - a for a, b in zip(one.layers, two.layers, strict=True)]
            again = [0] * len(layers)
            if compiled:  # what does not grow with the tokens is copies of weights
                copies = [a - b for a, b in zip(one.layers, layers, strict=True)]
                cut = less = _compiled(model, base, batches[0], casts, alike)
                if recomputes_norms:
                    for layer in decoder_layers(base):
                        recompute_norms(layer)
                    less = _compiled(model, base, batches[0], casts, alike)
                layers = [a - b for a, b in zip(less, copies, strict=True)]
                again = [a - b for a, b in zip(cut, less, strict=True)]
    except _NOT_ON_FAKE as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"the layers of {base.config.model_type} do not run without numbers ({reason}): no "
            "plan is made for it"
        ) from error
    tokens, every = ROWS * rows.tokens, [layers[first] for first in alike]
    adapters = sum(name.endswith(".lora_A") for name, _ in model.named_modules())
    return Measured(
        kept=sum(every) / len(every) / tokens,
        largest=max(every) / tokens,
        again=sum(again[first] for first in alike) / len(alike) / tokens,
        outside=(two.outside - one.outside) / tokens,
        working=(two.working - one.working) / tokens,
        operations=0 if compiled and not mixers else one.operations / len(set(alike)),
        adapters=adapters / len(alike),
        recurrent=mixers,
    )


def _without_numbers(model: nn.Module) -> None:
    """Replace the parameters and buffers of a model on the meta device by fake ones on a CPU."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, one in module._parameters.items():
            if one is not None and id(one) not in made:
                empty = torch.empty(one.shape, dtype=one.dtype)
                made[id(one)] = nn.Parameter(empty, requires_grad=one.requires_grad)
            module._parameters[name] = None if one is None else made[id(one)]
        for name, one in module._buffers.items():
            if one is not None:
                module._buffers[name] = torch.empty(one.shape, dtype=one.dtype)


def _prepare(base: PreTrainedModel, rows: Rows) -> None:
    base.train()
    if rows.packed:
        pack_mixers(base)
    if base._can_set_experts_implementation():
        base.set_experts_implementation(GROUPED)


@contextlib.contextmanager
def _gpu_dropout(model: nn.Module) -> Iterator[None]:
    """Let dropout keep a byte of each element, as on a GPU, and attention's keep nothing."""
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p:
            module.forward = partial(_dropped, module.p)
    own = functional.scaled_dot_product_attention

    def attention(*args: Any, dropout_p: float = 0.0, **kwargs: Any) -> torch.Tensor:
        return own(*args, **kwargs)

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own


def _dropped(p: float, x: torch.Tensor) -> torch.Tensor:
    return torch.native_dropout(x, p, True)[0]


def _alike(base: PreTrainedModel) -> list[int]:
    """Returns for each decoder layer the number of the first one that is like it."""
    first: dict[Any, int] = {}
    types = getattr(base.config.get_text_config(), "layer_types", None)
    layers = decoder_layers(base)
    if not layers:
        raise ValueError("it has no list of decoder layers")
    return [
        first.setdefault((_kind(layer), types and types[index]), index)
        for index, layer in enumerate(layers)
    ]


def _kind(layer: nn.Module) -> tuple:
    plain = (bool, int, float, str, type(None))
    modules = tuple(
        (name, type(module).__name__)
        + tuple((k, v) for k, v in vars(module).items() if isinstance(v, plain) and "idx" not in k)
        for name, module in layer.named_modules()
    )
    return modules, tuple((n, p.shape, p.requires_grad) for n, p in layer.named_parameters())


def _batch(rows: Rows, count: int, mixers: bool) -> dict[str, Any]:
    """Returns a batch of `count` rows as the collator makes it."""
    if not rows.packed:
        shape = count, rows.longest
        return {
            "input_ids": torch.zeros(shape, dtype=torch.long),
            "attention_mask": torch.ones(shape, dtype=torch.long),
        }
    tokens = count * rows.mean
    batch = {
        "input_ids": torch.zeros(1, tokens, dtype=torch.long),
        "position_ids": torch.zeros(1, tokens, dtype=torch.long),
        "tiles": torch.zeros(2, count * -(-rows.mean // TILE), 1, 3, dtype=torch.int32),
    }
    if mixers:
        batch |= {
            "cu_seq_lens_q": torch.zeros(count + 1, dtype=torch.int32),
            "seq_idx": torch.zeros(1, tokens, dtype=torch.int32),
            "row_places": torch.zeros(count, rows.longest, dtype=torch.long),
        }
    return batch


def _run(
    model: nn.Module, base: PreTrainedModel, batch: dict[str, Any], casts: bool, alike: list[int]
) -> _Counted:
    """Returns what a forward and a backward of a batch take."""
    saved, live = SavedTensors(model.parameters()), LiveMemory()
    with live, _saving(saved, base, casts, alike):
        out = decoder_of(base)(**batch, use_cache=False).last_hidden_state
        at_end = live.now
        out.backward(torch.empty_like(out))
    for parameter in model.parameters():
        parameter.grad = None
    layers = [saved.bytes[index] for index in range(len(alike))]
    return _Counted(layers, saved.bytes[-1], live.peak - at_end, live.operations)


def _compiled(
    model: nn.Module, base: PreTrainedModel, batch: dict[str, Any], casts: bool, alike: list[int]
) -> list[int]:
    """Returns the bytes that each layer keeps where inductor's partitioner has cut it."""
    backend = aot_autograd(
        fw_compiler=lambda graph, _: graph.forward,
        bw_compiler=lambda graph, _: graph.forward,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    first = [layer for i, layer in enumerate(decoder_layers(base)) if alike[i] == i]
    own = [layer.forward for layer in first]
    for layer in first:
        layer.forward = torch.compile(layer.forward, backend=backend, dynamic=False)
    saved = SavedTensors(model.parameters())
    with (
        warnings.catch_warnings(action="ignore"),
        torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True),
        _saving(saved, base, casts, alike),
    ):
        decoder_of(base)(**batch, use_cache=False)
    for layer, forward in zip(first, own, strict=True):
        layer.forward = forward
    return [saved.bytes[index] for index in range(len(alike))]


def why_several_graphs(base: PreTrainedModel, rows: Rows) -> str | None:
    """Returns why a decoder layer is compiled in several graphs, of a model on the meta device.

    None where it is compiled in one. The model is of no use afterwards.
    """
    torch.compiler.reset()
    with (
        FakeTensorMode(),
        without_kernels(base),
        warnings.catch_warnings(action="ignore"),
        _gpu_dropout(base),
    ):
        _without_numbers(base)
        _prepare(base, rows)
        alike = _alike(base)
        for layer in decoder_layers(base):
            layer.forward = torch.compile(
                layer.forward, backend="eager", fullgraph=True, dynamic=False
            )
        batch = _batch(rows, ROWS, bool(packed_mixers(base)))
        try:
            with _saving(SavedTensors(base.parameters()), base, True, alike):
                decoder_of(base)(**batch, use_cache=False)
        except _NOT_ON_FAKE as error:
            given = _REASON.search(str(error))
            return given[1] if given else " ".join(str(error).splitlines()[0].split())
    return None


@contextlib.contextmanager
def _saving(
    saved: SavedTensors, base: PreTrainedModel, casts: bool, alike: list[int]
) -> Iterator[None]:
    """Let a forward say what it saves, with one layer of those that are alike."""
    end = saved.watch(decoder_layers(base), alike)
    cast = torch.autocast("cpu", torch.bfloat16) if casts else contextlib.nullcontext()
    try:
        with cast, torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda one: one):
            yield
    finally:
        end()
