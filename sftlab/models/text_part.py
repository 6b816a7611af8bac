"""The text model within a checkpoint that takes images or sound too.

transformers loads the whole checkpoint; its decoder and its head become a causal language model.
The decoder keeps its name in the checkpoint, so an adapter that is trained on it loads into the
checkpoint with plain peft. Before use, the text model's logits are held to the whole model's.
"""

from copy import copy
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
)

# Where the decoder stands in a checkpoint of several parts, and its head.
DECODER, HEAD = "model.language_model", "lm_head"
# Largest difference of equal logits, relative to the largest: float32 and fewer bits.
SAME = {torch.float32: 1e-5}
SAME_IN_16_BITS = 2**-6
_TOKENS = 16
# What transformers notes on a model that it has quantised.
_OF_QUANTISED = (
    "hf_quantizer",
    "is_quantized",
    "quantization_method",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "is_4bit_serializable",
    "is_8bit_serializable",
)


class Nested(nn.Module):
    """A decoder under the name that it has in its checkpoint. It is asked like the decoder."""

    def __init__(self, decoder: PreTrainedModel) -> None:
        super().__init__()
        self.language_model = decoder

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the decoder returns."""
        return self.language_model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Returns what the decoder has under a name that this module lacks."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("language_model"), name)


def text_config_of(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """Returns the config of a checkpoint's text model; None where it has no such part.

    transformers' own class for the whole checkpoint must be one for images and text.
    """
    text = config.get_text_config()
    if text is config or type(config) not in AutoModelForImageTextToText._model_mapping:
        return None
    if not has_causal_model(text):
        return None
    text.name_or_path = config.name_or_path
    return text


def _parts(whole: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    modules = dict(whole.named_modules())
    if DECODER not in modules or HEAD not in modules:
        raise ValueError(
            f"{type(whole).__name__} has no text model named {DECODER} with a head named {HEAD}: "
            "give a text-only model"
        )
    return modules[DECODER], modules[HEAD]


def _note_tie(text: PreTrainedConfig, decoder: PreTrainedModel, head: nn.Module) -> None:
    """Let a text config say whether head and embeddings are one, as the whole's config decides."""
    text.tie_word_embeddings = head.weight is decoder.get_input_embeddings().weight


def has_causal_model(text: PreTrainedConfig) -> bool:
    """Whether a text config has a causal language model, after one is made of its decoder here."""
    known = AutoModelForCausalLM._model_mapping
    if type(text) not in known and type(text) in MODEL_MAPPING:
        made = _with_head(MODEL_MAPPING[type(text)])
        AutoModelForCausalLM.register(type(text), made, exist_ok=True)
    return type(text) in known


def read_structure(config: PreTrainedConfig) -> None:
    """Let the text's config say whether its head is its embeddings, as in the whole checkpoint.

    Raises ValueError where the text model is not where `text_model` looks for it.
    """
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(config)
    _note_tie(config.get_text_config(), *_parts(whole))


def text_model(whole: PreTrainedModel) -> PreTrainedModel:
    """Returns the causal language model within a checkpoint that transformers has loaded.

    Its decoder and its head are those of `whole`. Raises ValueError where they are not found, or
    where the text model's logits would not be the whole model's.
    """
    config, (decoder, head) = text_config_of(whole.config), _parts(whole)
    _note_tie(config, decoder, head)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=whole.dtype)
    model.model, model.lm_head, model.config = Nested(decoder), head, decoder.config
    model.generation_config, model.name_or_path = whole.generation_config, whole.name_or_path
    model.text_of, model.whole_type = type(whole).__name__, whole.config.model_type
    for one in _OF_QUANTISED:
        if hasattr(whole, one):
            setattr(model, one, getattr(whole, one))
    model.train(whole.training)
    if head.weight.device.type != "meta":
        _refuse_other_logits(model, whole)
    return model


def unnested(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model with its decoder under the name that text-only models use.

    Raises ValueError where transformers could not load it without the rest of its checkpoint.
    """
    made, own = (type(model).__module__.startswith(one) for one in (__name__, "transformers."))
    if made or (own and type(model.config) not in AutoModelForCausalLM._model_mapping):
        raise ValueError(
            f"transformers has no text-only class for {model.config.model_type}, so its text model "
            "alone could not be loaded: train an adapter (use_peft: true) and export it with "
            "--to adapter"
        )
    if not isinstance(getattr(model, "model", None), Nested):
        return model
    model.model = model.model.language_model
    return model


def name_adapted_layers(model: PeftModel) -> None:
    """Let the adapter's config name all that it adapts within a larger checkpoint.

    A layer of the vision part may have the same short name, and peft would adapt it too. Raises
    ValueError where peft would take the names for others.
    """
    text = model.get_base_model()
    if not isinstance(getattr(text, "model", None), Nested):
        return
    adapted = [(name, m) for name, m in text.named_modules() if isinstance(m, BaseTunerLayer)]
    layers = sorted(name for name, one in adapted if not isinstance(one, ParamWrapper))
    parameters = sorted(
        f"{name.replace('.base_layer', '')}.{one.parameter_name}"
        for name, one in adapted
        if isinstance(one, ParamWrapper)
    )
    for config in model.peft_config.values():
        config.target_modules, config.target_parameters = layers, parameters or None
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        _refuse_other_names(config, text)


def _refuse_other_names(config: LoraConfig, text: PreTrainedModel) -> None:
    """Raise ValueError where peft would look for other layers in the whole checkpoint.

    Of some mixtures it takes names of linears for those that experts had before they were stacked.
    """
    whole, read = SimpleNamespace(config=SimpleNamespace(model_type=text.whole_type)), copy(config)
    convert_peft_config_for_transformers(read, whole, None)
    if others := {*config.target_modules} - {*read.target_modules}:
        ends = sorted({name.rpartition(".")[2] for name in others})
        raise ValueError(
            f"peft would take {', '.join(ends)} of a {text.text_of} for its experts where the "
            f"adapter is loaded: leave them out with --exclude_modules {' '.join(ends)}"
        )


def _refuse_other_logits(model: PreTrainedModel, whole: PreTrainedModel) -> None:
    """Raise ValueError where text alone gives other logits than the whole model gives of it."""
    training = whole.training
    ids = torch.arange(3, 3 + _TOKENS, device=model.lm_head.weight.device)[None]
    whole.eval()
    with torch.no_grad():
        expected = whole(input_ids=ids, use_cache=False).logits.float()
        got = model.eval()(input_ids=ids, use_cache=False).logits.float()
    whole.train(training)
    model.train(training)
    largest, apart = float(expected.abs().max()), float((got - expected).abs().max())
    if not apart <= SAME.get(model.lm_head.weight.dtype, SAME_IN_16_BITS) * largest:
        raise ValueError(
            f"the text model within {type(whole).__name__} gives other logits than the whole model "
            f"(by up to {apart:.3g} of {largest:.3g}): give a text-only model"
        )


def _with_head(decoder: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Returns a causal language model's class for a decoder that transformers has no other for."""
    name = decoder.__name__.removesuffix("TextModel") + "ForCausalLM"
    base = next(one for one in decoder.__mro__[1:] if one.__name__.endswith("PreTrainedModel"))

    def initialise(self: PreTrainedModel, config: PreTrainedConfig) -> None:
        super(made, self).__init__(config)
        self.model, self.vocab_size = decoder(config), config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    made = type(
        name,
        (base, GenerationMixin),
        {
            "__doc__": f"{decoder.__name__} with a head.",
            "__module__": __name__,
            "__init__": initialise,
            "_tied_weights_keys": Qwen2ForCausalLM._tied_weights_keys,
            "config_class": decoder.config_class,
            # transformers reads the source of a class's module to know, and here is none
            "_can_set_attn_implementation": decoder._can_set_attn_implementation,
            "_can_set_experts_implementation": decoder._can_set_experts_implementation,
            "forward": Qwen2ForCausalLM.forward,
        },
    )
    return made
