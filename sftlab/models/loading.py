"""The base model: checks before its weights are loaded, and how they are loaded."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from sftlab.config.recipe import ModelArguments, TrainingArguments

# Conv1D is GPT-2's linear layer, with a transposed weight
LINEAR_LAYERS = (torch.nn.Linear, Conv1D)


def load_tokenizer(
    name: str, revision: str, training: TrainingArguments
) -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer. Raises ValueError where the model cannot be loaded."""
    tokenizer = _from_hub(
        AutoTokenizer, name, revision=revision, trust_remote_code=training.trust_remote_code
    )
    if training.eos_token is not None:
        if training.eos_token not in tokenizer.get_vocab():
            raise ValueError(f"eos_token {training.eos_token!r} is not in the vocabulary of {name}")
        tokenizer.eos_token = training.eos_token
    return tokenizer


def load_config(
    name: str, revision: str, training: TrainingArguments, with_weights: bool = True
) -> PreTrainedConfig:
    """Load the base model's config, with the overrides of `model_init_kwargs`.

    Raises ValueError where it cannot be loaded, for a model without safetensors, and for one that
    takes more than text.
    """
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"base model {name} holds no config.json: give a model's folder, or its name on the hub"
        )
    if with_weights and Path(name).is_dir() and not any(Path(name).glob("*.safetensors")):
        raise ValueError(
            f"base model {name} holds no .safetensors file: pickled weights are not loaded"
        )
    overrides = training.model_init_kwargs or {}
    config = _from_hub(
        AutoConfig,
        name,
        revision=revision,
        trust_remote_code=training.trust_remote_code,
        **overrides,
    )
    taken = model_class(config)
    if (
        taken is not None
        and taken.config_class is type(config)
        and config.get_text_config() is not config
    ):
        raise ValueError(
            f"{name} is a {taken.__name__}, which takes more than text: give a text-only model"
        )
    return config


def model_class(config: PreTrainedConfig) -> type | None:
    """Returns transformers' class for this config, or None for a model with remote code."""
    mapping = AutoModelForCausalLM._model_mapping
    return mapping.get(type(config), None)


def check_target_modules(
    config: PreTrainedConfig, targets: str | list[str], trust_remote_code: bool
) -> None:
    """Raise ValueError where a LoRA target is not among the model's linear layers."""
    if targets == "all-linear":
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    has = sorted(
        {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, LINEAR_LAYERS)}
        - {"lm_head"}
    )
    missing = [
        t
        for t in ([targets] if isinstance(targets, str) else targets)
        if t.rpartition(".")[2] not in has
    ]
    if missing:
        raise ValueError(
            f"lora_target_modules {', '.join(missing)}: {type(model).__name__} has no such linear "
            f"layer; it has {', '.join(has)}"
        )


def model_init_kwargs(
    model: ModelArguments, trust_remote_code: bool, overrides: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns the keyword arguments of `from_pretrained`, for training and evaluation.

    Only safetensors are loaded.
    """
    kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": trust_remote_code,
        "dtype": model.dtype,
        "use_safetensors": True,
    }
    if model.attn_implementation is not None:
        kwargs["attn_implementation"] = model.attn_implementation
    return kwargs | (overrides or {})


def _from_hub(auto_class: Any, name: str, **kwargs: Any) -> Any:
    if not Path(name).exists() and (name.count("/") > 1 or name.startswith((".", "data/"))):
        hint = ": `python recipes/demo/build.py` makes it" if "demo" in name else ""
        raise ValueError(f"base model {name} not found (looked in {Path.cwd()}){hint}")
    try:
        return auto_class.from_pretrained(name, **kwargs)
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
        raise ValueError(
            f"base model {name} cannot be read: {str(error).splitlines()[0]}"
        ) from error
