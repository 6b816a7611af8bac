"""Checkpoints that no language model is fine-tuned from: quantised ones, encoders, classifiers.

transformers loads some of them without a word, and another model than the published one trains.
gpt-oss is published in MXFP4 alone, whose numbers 16 bits hold exactly: it is loaded in these.
"""

import re
from collections.abc import Iterable

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    Mxfp4Config,
    PreTrainedConfig,
)

# Fields of a config that say how the weights are quantised.
_FIELDS = ("quantization_config", "compression_config")
# Tensors that only quantised weights have, by the ends of their names.
_OF_QUANTISED = re.compile(
    r"[._](qweight|qzeros|g_idx|weight_scale(_inv)?|weight_packed|absmax|blocks|SCB)$"
)
# Classes whose head answers another question than which word comes next.
_OF_ANOTHER_TASK = re.compile(r"For\w*(Classification|QuestionAnswering)$|RewardModel$")


def refuse_quantised(config: PreTrainedConfig, name: str) -> None:
    """Raise ValueError for a checkpoint whose config says that its weights are quantised."""
    method = _method(config)
    if method is not None and in_16_bits(config) is None:
        raise ValueError(_quantised(name, f"config.json says {method}"))


def in_16_bits(config: PreTrainedConfig) -> Mxfp4Config | None:
    """Returns what lets transformers give exact 16-bit weights of a quantised checkpoint, or None.

    Another method's products, of numbers and scales, are rounded in 16 bits.
    """
    exact = config.model_type == "gpt_oss" and _method(config) == "mxfp4"
    return Mxfp4Config(dequantize=True) if exact else None


def _method(config: PreTrainedConfig) -> str | None:
    """Returns how the weights are quantised, None where the config does not say that they are."""
    for one in (config, config.get_text_config()):
        if found := next((given for x in _FIELDS if (given := getattr(one, x, None))), None):
            given = found if isinstance(found, dict) else vars(found)
            return given.get("quant_method") or "a method without a name"
    return None


def refuse_quantised_tensors(names: Iterable[str], name: str) -> None:
    """Raise ValueError where one of the tensors is of a quantised weight."""
    if found := sorted(one for one in names if _OF_QUANTISED.search(one)):
        raise ValueError(_quantised(name, f"it holds {found[0]}"))


def _quantised(name: str, why: str) -> str:
    return (
        f"{name} is already quantised ({why}): give its checkpoint in 16 bits, with load_in_4bit "
        "where memory is short"
    )


def refuse_encoder(config: PreTrainedConfig, name: str) -> None:
    """Raise ValueError for the config of an encoder, of a classifier, or of no causal model.

    Code that the model brings is not looked at.
    """
    made = getattr(config, "architectures", None) or [""]
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    writes = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if getattr(config, "is_encoder_decoder", False):
        kind = "its config is of an encoder-decoder"
    elif type(config) in AutoModelForMaskedLM._model_mapping and not writes:
        kind = "its config is of an encoder"
    elif type(config) not in AutoModelForCausalLM._model_mapping and not remote:
        kind = "transformers has no causal class for its config"
    elif _OF_ANOTHER_TASK.search(made[0]):
        kind = f"config.json says {made[0]}, whose head gives no words"
    else:
        return
    raise ValueError(
        f"{name} is no causal language model: {kind} ({config.model_type}); give a model that "
        "writes text from left to right"
    )
