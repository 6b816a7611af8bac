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
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig

_NAME = "described"
_TOKENS = 4
# Tensors among an attention's arguments that do not change it, or are understood.
_KNOWN_TENSORS = {"position_ids", "tiles", "s_aux"}
_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
# What a model may raise that cannot run without numbers.
_NOT_ON_META = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


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

    `count` is the number of decoder layers, `convolutions` that of modules that mix neighbouring
    tokens. `unknown` says why the layers cannot be described; None where they are.
    """

    count: int
    attention: tuple[Attention, ...] = ()
    convolutions: int = 0
    unknown: str | None = None

    @property
    def distinct(self) -> tuple[Attention, ...]:
        """The different kinds of attention, in the order of the layers."""
        return tuple(dict.fromkeys(self.attention))

    @property
    def hybrid(self) -> bool:
        """Whether something beside attention carries a row's state from token to token."""
        return self.convolutions > 0 or len(self.attention) < self.count


def describe(config: PreTrainedConfig, model_class: type | None) -> Layers:
    """Returns the layers of a model of `model_class` with this config. Nothing is loaded."""
    text = config.get_text_config()
    if not getattr(model_class, "_supports_attention_backend", False):
        unknown = f"{text.model_type} does not take another attention"
        return Layers(getattr(text, "num_hidden_layers", 0), unknown=unknown)
    return _described(pickle.dumps(config))


@lru_cache(maxsize=16)
def _described(pickled: bytes) -> Layers:
    config = pickle.loads(pickled)
    if hasattr(config, "quantization_config"):  # of a model that was loaded in 4 bits
        del config.quantization_config
    decoder, found = config.get_text_config(), []
    AttentionInterface.register(_NAME, _recorder(decoder, found))
    convolutions, unknown = 0, None
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=_NAME, dtype=torch.bfloat16
            )
            convolutions = sum(isinstance(module, nn.Conv1d) for module in model.modules())
            ids = torch.zeros(1, _TOKENS, dtype=torch.long)
            # what a packed batch has
            given = {"position_ids": torch.arange(_TOKENS)[None], "tiles": ids, "use_cache": False}
            model.train()(input_ids=ids, **given)
    except _NOT_ON_META as error:
        reason = " ".join(str(error).split())[:120]
        unknown = f"the layers of {decoder.model_type} cannot be described ({reason})"
    unknown = next((one for one in found if isinstance(one, str)), unknown)
    attention = () if unknown else tuple(found)
    return Layers(decoder.num_hidden_layers, attention, convolutions, unknown)


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
        return f"{name} lets tokens attend to later ones"
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
