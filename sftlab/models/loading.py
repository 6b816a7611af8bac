"""The base model: checks before its weights are loaded, and how they are loaded."""

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from trl import get_quantization_config

from sftlab.config.model_overrides import check_overrides
from sftlab.config.recipe import ModelArguments, TrainingArguments
from sftlab.models import four_bits
from sftlab.models.refused_checkpoints import (
    in_16_bits,
    refuse_encoder,
    refuse_quantised,
    refuse_quantised_tensors,
)
from sftlab.models.text_part import read_structure, text_config_of, text_model
from sftlab.models.trust import FLAG, check_base_folder, refuse_hub_kernels

logger = logging.getLogger(__name__)

# Conv1D is GPT-2's linear layer, with a transposed weight
LINEAR_LAYERS = (torch.nn.Linear, Conv1D)
# buffers that older files hold and today's models compute
_OF_OLD_FILES = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|position_ids$")
# parts of a checkpoint that its text model does not have
_OF_OTHER_PARTS = re.compile(r"(model\.)?(vision_|visual\.|multi_modal_projector\.|audio_tower\.)")
# what transformers raises for files that it cannot read
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)


def load_tokenizer(
    name: str, revision: str, training: TrainingArguments
) -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer. Raises ValueError where it cannot be loaded or used."""
    tokenizer = _from_hub(
        AutoTokenizer, name, revision=revision, trust_remote_code=training.trust_remote_code
    )
    _try_tokenizer(tokenizer, name)
    if training.eos_token is not None:
        if training.eos_token not in tokenizer.get_vocab():
            raise ValueError(f"eos_token {training.eos_token!r} is not in the vocabulary of {name}")
        tokenizer.eos_token = training.eos_token
    return tokenizer


def read_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer. Code that it brings is never run.

    Raises ValueError where it cannot be loaded or used.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        if not _unreadable(error):
            raise
        raise ValueError(
            f"{folder} holds no tokenizer that can be loaded: {_said(error, str(folder))}"
        ) from error
    _try_tokenizer(tokenizer, str(folder))
    return tokenizer


def _try_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise ValueError where odd values in the tokenizer's files keep it from encoding a text."""
    try:
        texts = ["Who?", "Who was it?"]
        encoded = tokenizer(texts, padding=tokenizer.pad_token is not None)["input_ids"]
        tokenizer.decode(encoded[0])
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"the tokenizer of {name} cannot encode a text: {_said(error, name)}; look at its "
            "tokenizer_config.json and tokenizer.json"
        ) from error


def load_config(
    name: str, revision: str, training: TrainingArguments, with_weights: bool = True
) -> PreTrainedConfig:
    """Load the base model's config, with the overrides of `model_init_kwargs`.

    Of a checkpoint that takes images too it is the text model's. Raises ValueError where it cannot
    be loaded, for a model without safetensors, for an encoder, for quantised weights, and for one
    without a text model.
    """
    overrides, trusted = training.model_init_kwargs, training.trust_remote_code
    config = read_config(name, revision, trusted, overrides, with_weights)
    text = _text_within(config)
    if text is config:
        refuse_encoder(config, name)
        return config
    if text is None:
        taken = model_class(config)
        kind = taken.__name__ if taken else f"{config.model_type} model"
        raise ValueError(f"{name} is a {kind}, which takes more than text: give a text-only model")
    _refuse_overrides(overrides, name)
    read_structure(config)
    return text


def _text_within(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """Returns the config of the text model that `text_model` takes out of the whole checkpoint.

    That is `config` itself where transformers' own class is that of the text alone, and None where
    there is no text model.
    """
    text, taken = config.get_text_config(), model_class(config)
    if text is config or (taken is not None and taken.config_class is type(text)):
        return config
    return text_config_of(config)


def _refuse_overrides(overrides: dict[str, Any] | None, name: str) -> None:
    """Raise ValueError for overrides that would change the whole model's config, not its text's."""
    if overrides:
        raise ValueError(
            f"{name} takes images too, and model_init_kwargs ({', '.join(overrides)}) would not "
            "reach its text model: leave model_init_kwargs out"
        )


def read_config(
    name: str,
    revision: str | None,
    trusted: bool = False,
    overrides: dict[str, Any] | None = None,
    with_weights: bool = True,
) -> PreTrainedConfig:
    """Read a model's config.

    Raises ValueError where it would run code without trust, and where the weights are quantised.
    """
    changes = check_overrides(overrides)
    if Path(name).is_dir():
        check_base_folder(Path(name), trusted, with_weights)
    config = _from_hub(AutoConfig, name, revision=revision, trust_remote_code=trusted, **changes)
    if not trusted:
        refuse_hub_kernels(getattr(config, "_attn_implementation", None), f"config of {name}")
    refuse_quantised(config, name)
    return config


def model_class(config: PreTrainedConfig) -> type | None:
    """Returns transformers' class for this config, or None for a model with remote code."""
    mapping = AutoModelForCausalLM._model_mapping
    return mapping.get(type(config), None)


def model_init_kwargs(
    model: ModelArguments, trust_remote_code: bool, overrides: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns the keyword arguments of `from_pretrained`, for training and evaluation.

    Only safetensors are loaded, and `overrides` may not say otherwise. Raises ValueError for an
    override that is not allowed, and for an attention from the hub without trust.
    """
    kwargs = check_overrides(overrides) | {
        "revision": model.model_revision,
        "trust_remote_code": trust_remote_code,
        "dtype": model.dtype,
        "use_safetensors": True,
    }
    if model.attn_implementation is not None:
        if not trust_remote_code:
            refuse_hub_kernels(model.attn_implementation, "attn_implementation")
        kwargs["attn_implementation"] = model.attn_implementation
    return kwargs


def load_model(
    model: ModelArguments, kwargs: dict[str, Any], device_map: str | None
) -> PreTrainedModel:
    """Load the base model with all of its weights.

    `kwargs` are those of `model_init_kwargs`. Raises ValueError where the model cannot be loaded,
    and where tensors are missing, unexpected or of another shape, with their names. Layers that
    `num_hidden_layers` cuts off are left out, and that is said.
    """
    quantization = get_quantization_config(model)
    return load_weights(model.model_name_or_path, kwargs, device_map, quantization)


def load_weights(
    name: str, kwargs: dict[str, Any], device_map: str | None, quantization: Any
) -> PreTrainedModel:
    """Load a causal language model as `load_model` does, the base model's or a judge's."""
    kwargs, trusted = dict(kwargs), kwargs["trust_remote_code"]
    config = read_config(name, kwargs.get("revision"), trusted)
    text = _text_within(config)
    within = text is not None and text is not config
    if text is config:
        refuse_encoder(config, name)
    # the other parts have no attention for packed rows
    attention = kwargs.pop("attn_implementation", None) if within else None
    loader = logging.getLogger("transformers.modeling_utils")
    loader.addFilter(_no_report)
    try:
        loaded, found = _from_hub(
            AutoModelForImageTextToText if within else AutoModelForCausalLM,
            name,
            device_map=device_map,
            quantization_config=quantization or in_16_bits(config),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, with their names
            **kwargs,
        )
    finally:
        loader.removeFilter(_no_report)
    four_bits.mend(loaded)
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise ValueError(f"base model {name} holds an adapter: give the base model alone")
    _refuse_other_tensors(loaded, found, name, kwargs.get("num_hidden_layers"))
    if within:
        loaded = text_model(loaded)
        _say_text_alone(name)
        if attention is not None:
            loaded.set_attn_implementation(attention)
    _name_decoder(loaded)
    _check_generation(loaded.generation_config, name)
    return loaded


def _name_decoder(model: PreTrainedModel) -> None:
    """Let `base_model`, which trl asks for, be the decoder where a class names one it lacks."""
    if model.base_model is model and isinstance(getattr(model, "model", None), torch.nn.Module):
        model.base_model_prefix = "model"


def _check_generation(config: GenerationConfig, name: str) -> None:
    """Raise ValueError for a value of generation_config.json that a generation falls over."""
    for key in ("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id"):
        ids = getattr(config, key)
        if not all(type(one) is int for one in (ids if isinstance(ids, list) else [ids or 0])):
            raise ValueError(
                f"generation_config.json of {name}: {key} is {ids!r}, expected token ids"
            )
    for key in ("output_hidden_states", "output_attentions", "output_scores", "output_logits"):
        if (value := getattr(config, key)) not in (None, True, False):
            raise ValueError(
                f"generation_config.json of {name}: {key} is {value!r}, expected true or false"
            )


def _refuse_other_tensors(
    model: PreTrainedModel, found: dict[str, Any], name: str, layers: int | None
) -> None:
    """Raise ValueError where the files hold other tensors than the model has."""
    unexpected = {one for one in found["unexpected_keys"] if not _OF_OLD_FILES.search(one)}
    cut = {one for one in unexpected if layers is not None and _layer(one) >= layers}
    other_parts = {one for one in unexpected if _OF_OTHER_PARTS.match(one)}
    wrong = {
        "missing": found["missing_keys"],
        "unexpected": unexpected - cut - other_parts,
        "of another shape": {one[0] for one in found["mismatched_keys"]},
    }
    if any(wrong.values()):
        refuse_quantised_tensors(unexpected | wrong["of another shape"], name)
        parts = [f"{len(one)} {what} ({_few(one)})" for what, one in wrong.items() if one]
        raise ValueError(
            f"the weights of base model {name} are not those of a {type(model).__name__}, tensors: "
            f"{', '.join(parts)}; missing ones would be random numbers, so give the whole model"
        )
    if other_parts:
        _say_text_alone(name)
    if cut and int(os.environ.get("RANK", 0)) == 0:
        whole = 1 + max(map(_layer, cut))
        logger.warning(f"{name} is cut to {layers} of {whole} layers, as model_init_kwargs asks")


def _say_text_alone(name: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        logger.warning(f"{name} takes images too: its text model alone is trained")


def _layer(tensor: str) -> int:
    """Returns the number of the layer that a tensor belongs to; -1 for none."""
    number = re.search(r"\.(\d+)\.", tensor)
    return int(number[1]) if number else -1


def _few(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:4]) + (", ..." if len(ordered) > 4 else "")


def _no_report(record: logging.LogRecord) -> bool:
    """Whether a message is none of transformers' tables of tensors, which are read here."""
    return "LOAD REPORT" not in record.getMessage()


def _unreadable(error: Exception) -> bool:
    """Whether an error says that files cannot be read. tokenizers raises a bare Exception."""
    return isinstance(error, _UNREADABLE) or type(error) is Exception


def _said(error: BaseException, name: str) -> str:
    """Returns an error in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):
        text = f"{name} lacks {text}"
    if "trust_remote_code" in text:
        return f"it brings code of its own, which runs only with {FLAG} on the command line"
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _from_hub(auto_class: Any, name: str, **kwargs: Any) -> Any:
    if not Path(name).exists() and (name.count("/") > 1 or name.startswith((".", "data/"))):
        hint = ": `python recipes/demo/build.py` makes it" if "demo" in name else ""
        raise ValueError(f"base model {name} not found (looked in {Path.cwd()}){hint}")
    try:
        return auto_class.from_pretrained(name, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except OSError as error:
        cause = error.__cause__ or error
        if isinstance(cause, GatedRepoError):
            raise ValueError(
                f"{name} is gated: ask for access on its page, then log in with `hf auth login`"
            ) from error
        if isinstance(cause, RepositoryNotFoundError):
            raise ValueError(
                f"{name} is not on the hub, or private: log in with `hf auth login`"
            ) from error
        if (
            isinstance(cause, OfflineModeIsEnabled)
            or "offline" in str(error)
            or "connect" in str(error)
        ):
            raise ValueError(
                f"base model {name} is neither a local folder nor in the cache, and the hub cannot "
                "be reached; a gated model also needs `hf auth login`"
            ) from error
        raise ValueError(f"base model {name} cannot be read: {_said(error, name)}") from error
    except Exception as error:
        if not _unreadable(error):
            raise
        raise ValueError(f"base model {name} cannot be read: {_said(error, name)}") from error
