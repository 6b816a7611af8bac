"""What are the layers of a model, as far as attention, loss and planner depend on it?

Families name the fields of their configs differently. So the model is built on the meta device,
without weights, and a few tokens go through it. What its layers hand to transformers' attention
interface is what they compute: sizes of heads, windows, caps, sinks. What is not understood is not
guessed: it is `unknown`, in words.
"""

import pickle
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from sftlab.models.gated_mlp import gated_mlps
from sftlab.models.mixers import packed_mixers, tokenwise_layers, without_kernels
from sftlab.models.mixture import Mixture, mixture_of
from sftlab.models.text_part import Nested
from sftlab.models.without_numbers import NOT_WITHOUT_NUMBERS

_NAME = "described"
_LATER = "lets tokens attend to later ones"
_TOKENS = 4
# Linears that read what a layer's norm makes, in layers like Llama's.
_AFTER_NORMS = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj"),
    *("gate_proj", "up_proj", "gate_up_proj"),
)
# Tensors among an attention's arguments that do not change it, or are understood.
_KNOWN_TENSORS = {"position_ids", "tiles", "s_aux"}
# "hybrid" layers attend to all earlier tokens, and carry a state besides
_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention", "hybrid"}


class Attention(NamedTuple):
    """One layer's attention: its heads, their sizes, and what happens to the scores.

    `window` is the number of tokens that a token sees, itself included. `chunk` is the length of
    the blocks of a row that attend to themselves alone. Both are 0 for all earlier tokens. `cap`
    bounds scores by tanh; 0.0 is none. `sinks` are scores of a head that have no value.
    """

    heads: int
    key_heads: int
    size: int
    value_size: int
    scale: float
    window: int = 0
    chunk: int = 0
    cap: float = 0.0
    sinks: bool = False
    dropout: float = 0.0

    def for_rows(self, longest: int | None) -> "Attention":
        """Returns this attention on rows of at most `longest` tokens; None has no limit.

        A window or a chunk that is no shorter than a row leaves nothing out.
        """
        if longest is None:
            return self
        return self._replace(
            window=self.window if self.window < longest else 0,
            chunk=self.chunk if self.chunk < longest else 0,
        )


class Layers(NamedTuple):
    """The attention of every layer that has one, in order, and what mixes tokens beside it.

    `count` is the number of decoder layers, and `convolutions` that of modules that mix
    neighbouring tokens. `mixers` is the number of modules beside attention that have a packed form,
    and `tokenwise` that of layers that mix nothing. `experts` is the share of the parameters that
    belong to experts and are no linears, but stacked in one tensor; `mixture` has their sizes.
    `norms` are the elements and the vectors of a token that a layer normalises beside the two norms
    of a Llama layer. `norms_first`: linears of the first layer's attention and MLP read what a norm
    makes. `linears` are the names of the layers' linears, and `gated_mlps` those of modules that
    compute down(f(gate(x)) up(x)) of linears without biases; `widest` is the most inputs or outputs
    that a linear of these has. `unknown` says why the attention
    cannot be described; None where it is. `sees_later` is set where a token attends to later ones.
    """

    count: int
    attention: tuple[Attention, ...] = ()
    convolutions: int = 0
    mixers: int = 0
    tokenwise: int = 0
    experts: float = 0.0
    norms: tuple[int, int] = (0, 0)
    norms_first: bool = True
    unknown: str | None = None
    mixture: Mixture | None = None
    linears: tuple[str, ...] = ()
    gated_mlps: tuple[str, ...] = ()
    sees_later: bool = False
    widest: int = 0

    @property
    def alike_and_gated(self) -> bool:
        """Whether every layer is attention of the same heads and a gated MLP, as Llama's are."""
        heads = {(a.heads, a.key_heads, a.size, a.value_size) for a in self.attention}
        alike = len(heads) == 1 and not self.hybrid and self.mixture is None
        return alike and len(self.gated_mlps) == self.count

    @property
    def distinct(self) -> tuple[Attention, ...]:
        """The different kinds of attention, in the order of the layers."""
        return tuple(dict.fromkeys(self.attention))

    @property
    def hybrid(self) -> bool:
        """Whether something beside attention carries a row's state from token to token."""
        return self.convolutions > 0 or len(self.attention) < self.count

    @property
    def without_packed_form(self) -> tuple[int, int]:
        """How many layers and convolutions would mix packed rows."""
        apart = len(self.attention) + self.mixers + self.tokenwise
        return max(0, self.count - apart), self.convolutions - self.mixers


def describe(config: PreTrainedConfig, model_class: type | None) -> Layers:
    """Returns the layers of a model of `model_class` with this config. Nothing is loaded."""
    if model_class is None:  # it brings code of its own
        text = config.get_text_config()
        unknown = f"{text.model_type} does not take another attention"
        return Layers(getattr(text, "num_hidden_layers", 0), unknown=unknown)
    takes_another = getattr(model_class, "_supports_attention_backend", False)
    return _described(pickle.dumps(config), takes_another)


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Returns the model without its head; some classes name a `base_model` that they lack."""
    base = model.base_model
    decoder = model.model if base is model else base
    return decoder.language_model if isinstance(decoder, Nested) else decoder


@lru_cache(maxsize=16)
def _described(pickled: bytes, takes_another: bool) -> Layers:
    config = pickle.loads(pickled)
    if hasattr(config, "quantization_config"):  # of a model that was loaded in 4 bits
        del config.quantization_config
    decoder, found = config.get_text_config(), []
    AttentionInterface.register(_NAME, _recorder(decoder, found))
    with torch.device("meta"):
        unknown = None
        try:
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation=_NAME
            )
        except NOT_WITHOUT_NUMBERS as error:
            unknown, takes_another = _cannot(decoder, error), False
            try:
                model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            except NOT_WITHOUT_NUMBERS:
                return Layers(decoder.num_hidden_layers, unknown=unknown)
        # hybrid models hand over their attention too, without saying so
        if unknown is None:
            takes_another = takes_another or bool(packed_mixers(model))
            other = f"{decoder.model_type} does not take another attention"
            read_norms = _watched(model)
            unknown = _run(model) if takes_another else other
    said = [one for one in found if isinstance(one, str)]
    unknown = next(iter(said), unknown)
    return Layers(
        decoder.num_hidden_layers,
        () if unknown else tuple(found),
        sum(isinstance(module, nn.Conv1d) for module in model.modules()),
        len(packed_mixers(model)),
        tokenwise_layers(model),
        _stacked(model) / max(1, sum(p.numel() for p in model.parameters())),
        (0, 0) if unknown or not found else _norms(model, decoder.hidden_size, found[0]),
        unknown is not None or read_norms(),
        unknown,
        mixture_of(model, decoder),
        tuple(_linears(model)),
        tuple(gated_mlps(model)),
        any(one.endswith(_LATER) for one in said),
        _widest(model),
    )


def _widest(model: nn.Module) -> int:
    """Returns the most inputs or outputs of a linear in a gated MLP; 0 where there is none."""
    linears = (model.get_submodule(f"{mlp}.up_proj") for mlp in gated_mlps(model))
    return max((max(one.in_features, one.out_features) for one in linears), default=0)


def _stacked(model: nn.Module) -> int:
    """Returns the parameters of experts that are not the weights of linears."""
    return sum(
        parameter.numel()
        for name, module in model.named_modules()
        if ".experts" in f".{name}" and not isinstance(module, nn.Linear)
        for parameter in module.parameters(recurse=False)
        if parameter.ndim > 1
    )


def _linears(model: nn.Module) -> list[str]:
    """Returns the names of the linears within the first list of modules, the layers."""
    named = list(model.named_modules())
    layers = next((name for name, m in named if isinstance(m, nn.ModuleList)), None)
    within = (one for one in named if layers and one[0].startswith(f"{layers}."))
    return [name for name, module in within if isinstance(module, nn.Linear)]


def _norms(model: PreTrainedModel, hidden: int, attention: Attention) -> tuple[int, int]:
    """Returns what the first layer normalises beside two vectors of the hidden size."""
    layer = next(m for m in model.modules() if isinstance(m, nn.ModuleList))[0]
    elements, vectors = -2 * hidden, -2
    for name, module in layer.named_modules():
        if not type(module).__name__.endswith("Norm"):
            continue
        heads = {"q_norm": attention.heads, "k_norm": attention.key_heads}.get(name.split(".")[-1])
        width = hidden if heads is None else heads * attention.size
        of_a_head = heads and getattr(module, "weight", torch.empty(0)).numel() == attention.size
        elements, vectors = elements + width, vectors + (heads if of_a_head else 1)
    return max(0, elements), max(0, vectors)


def _watched(model: PreTrainedModel) -> Callable[[], bool]:
    """Returns what says after a forward whether linears of the first layer read norms' outputs."""
    lists = (one for one in model.modules() if isinstance(one, nn.ModuleList) and len(one))
    made: list[torch.Tensor] = []
    others: list[nn.Module] = []

    def look(linear: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if not any(given[0] is one for one in made):
            others.append(linear)

    for name, module in next(lists, nn.ModuleList([nn.Module()]))[0].named_modules():
        if type(module).__name__.endswith("Norm"):
            module.register_forward_hook(lambda _, __, output: made.append(output))
        elif isinstance(module, nn.Linear) and name.rpartition(".")[2] in _AFTER_NORMS:
            module.register_forward_pre_hook(look)
    return lambda: not others


def _run(model: PreTrainedModel) -> str | None:
    """Run a model on the meta device as a packed batch would; returns why it cannot be."""
    ids, positions = torch.zeros(1, _TOKENS, dtype=torch.long), torch.arange(_TOKENS)[None]
    try:
        with without_kernels(model):
            model.train()(input_ids=ids, position_ids=positions, tiles=ids, use_cache=False)
    except NOT_WITHOUT_NUMBERS as error:
        return _cannot(model.config, error)
    return None


def _cannot(config: PreTrainedConfig, error: Exception) -> str:
    reason = " ".join(str(error).split())[:120]
    return f"the layers of {config.model_type} cannot be described ({reason})"


def _recorder(
    config: PreTrainedConfig, found: list[Attention | str]
) -> Callable[..., tuple[torch.Tensor, None]]:
    """Returns an attention function that notes what it is asked for in `found`."""

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **given: Any,
    ) -> tuple[torch.Tensor, None]:
        not_understood = _not_understood(config, module, attention_mask, given)
        found.append(not_understood or _attention(config, module, query, key, value, given))
        rows, heads, tokens, _ = query.shape
        return value.new_empty(rows, tokens, heads, value.shape[-1]), None

    return attend


def _attention(
    config: PreTrainedConfig,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    given: dict[str, Any],
) -> Attention:
    chunked = _layer_type(config, module) == "chunked_attention"
    return Attention(
        heads=query.shape[1],
        key_heads=key.shape[1],
        size=query.shape[-1],
        value_size=value.shape[-1],
        scale=query.shape[-1] ** -0.5 if given.get("scaling") is None else given["scaling"],
        window=given.get("sliding_window") or 0,
        chunk=config.attention_chunk_size if chunked else 0,
        cap=given.get("softcap") or 0.0,
        sinks=given.get("s_aux") is not None,
        dropout=given.get("dropout") or 0.0,
    )


def _not_understood(
    config: PreTrainedConfig,
    module: nn.Module,
    mask: torch.Tensor | None,
    given: dict[str, Any],
) -> str | None:
    """Returns what a layer's attention asks for that `Attention` cannot say; None for nothing."""
    name, kind = config.model_type, _layer_type(config, module)
    if mask is not None:
        return f"{name} makes an attention mask of its own"
    if not given.get("is_causal", getattr(module, "is_causal", True)):
        return f"{name} {_LATER}"
    tensors = {key for key, value in given.items() if isinstance(value, torch.Tensor)}
    if other := sorted(tensors - _KNOWN_TENSORS):
        return f"{name} gives its attention {', '.join(other)}"
    if "tiles" not in tensors:
        return f"{name} does not tell its attention where rows begin"
    if kind not in _LAYER_TYPES:
        return f"{name} has layers of {kind}"
    if kind == "sliding_attention" and not given.get("sliding_window"):
        return f"{name} does not tell its attention the sliding window"
    return None


def _layer_type(config: PreTrainedConfig, module: nn.Module) -> str:
    types, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if not types or index is None or index >= len(types):
        return "full_attention"
    return types[index]
