"""Do the names in a recipe's LoRA fields match modules of the model?

peft adapts what matches and ignores the rest. Here every name must match something. Names match as
in peft: a whole module name, or its end after a dot; a string that is no list is a pattern.
"""

import re
import warnings
from collections.abc import Collection

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from sftlab.config.launch import Launch
from sftlab.config.recipe import ModelArguments
from sftlab.exit_messages import first_line
from sftlab.models.lora_config import lora_config

_ADAPTED = (nn.Linear, Conv1D)
# peft/tuners/tuners_utils.py, _check_lora_target_modules_mamba
_MIXERS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_MIXER_OUTPUTS = ("conv1d", "out_proj")
# their mixers read the weight of dt_proj themselves, without what LoRA adds; two of them call the
# layer where it is quantised
_READING_DT_PROJ, _CALLING_QUANTISED = ("mamba", "falcon_mamba", "jamba"), ("falcon_mamba", "jamba")
# what transformers raises for values of a config that contradict each other
_UNBUILT = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_SENSES = {"audio", "image", "speech", "vision", "visual"}
_TIED = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")


def check_adapter_names(
    model: ModelArguments, config: PreTrainedConfig, launch: Launch, trust_remote_code: bool
) -> None:
    """Raise ValueError for a name of a LoRA field that the model lacks or that cannot be trained.

    Only the model's config is used; no weights are loaded.
    """
    built = _built(config, trust_remote_code)
    linear = [name for name, one in built.named_modules() if isinstance(one, _ADAPTED)]
    adapted = [name for name in linear if name != "lm_head"]
    _check_targets(model.lora_target_modules, adapted, type(built).__name__)
    _check_excluded(model, adapted, built)
    _refuse_mixer_outputs(model, adapted, config.model_type)
    _refuse_routers(model, adapted, built)
    _refuse_towers(model, adapted, config.model_type)
    every = [name for name, _ in built.named_modules() if name]
    _check_each("lora_modules_to_save", model.lora_modules_to_save, every, built)
    _check_parameters(model.lora_target_parameters, built)
    if model.lora_modules_to_save:
        _check_saved(model, model.lora_modules_to_save, config, launch)
    _refuse_dropout(model, built)


def _refuse_dropout(model: ModelArguments, built: nn.Module) -> None:
    """Raise ValueError for dropout where LoRA is on parameters, as it may be under all-linear.

    peft says so after the weights are loaded. It adapts `built` here.
    """
    stacked = any(p.ndim == 3 and ".experts." in name for name, p in built.named_parameters())
    config = lora_config(model)
    if not model.lora_dropout or not (stacked or model.lora_target_parameters) or config is None:
        return
    config.init_lora_weights = True
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            get_peft_model(built, config)
    except ValueError as error:
        if "ParamWrapper does not work with lora_dropout" not in str(error):
            return
        field = "lora_target_parameters" if model.lora_target_parameters else "lora_target_modules"
        raise ValueError(
            f"lora_dropout is {model.lora_dropout}, and peft has no dropout for LoRA on experts or "
            f"their router, which {field} means here: pass --lora_dropout 0"
        ) from error


def _built(config: PreTrainedConfig, trust_remote_code: bool) -> nn.Module:
    """Returns the model without weights. Raises ValueError for a config that makes no model."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except _UNBUILT as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(
            f"config.json of the base model {config.name_or_path} makes no model ({said}): compare "
            "it with the one that the model was published with"
        ) from error


def _refuse_mixer_outputs(model: ModelArguments, linear: Collection[str], model_type: str) -> None:
    """Raise ValueError where a recipe adapts linear layers of a Mamba mixer that stay as they are.

    peft refuses some, and LoRA has no effect on others.
    """
    targets = model.lora_target_modules
    outputs = _MIXER_OUTPUTS if model_type in _MIXERS else ()
    called = (model.load_in_4bit or model.load_in_8bit) and model_type in _CALLING_QUANTISED
    without_effect = ("dt_proj",) if model_type in _READING_DT_PROJ and not called else ()
    left_out = (*outputs, *without_effect)
    if not left_out or targets is None:
        return
    linear = [name for name in linear if not _matches(model.exclude_modules, name)]
    if targets == "all-linear":
        asked = _ends(linear)
    elif isinstance(targets, str):
        asked = _ends([name for name in linear if re.fullmatch(targets, name)] or [targets])
    else:
        asked = _ends([one for one in targets if not _matches(model.exclude_modules, one)])
    if refused := [name for name in asked if name in left_out]:
        others = [name for name in _ends(linear) if name not in left_out]
        by_peft = [name for name in refused if name in outputs]
        whys = [f"peft does not adapt {', '.join(by_peft)}"] * bool(by_peft)
        whys += ["LoRA has no effect on dt_proj"] * (len(by_peft) < len(refused))
        raise ValueError(
            f"{' and '.join(whys)} of {model_type}: pass "
            f"--lora_target_modules {' '.join(others)}, or some of them; or leave them out with "
            f"--exclude_modules {' '.join(refused)}"
        )


def _refuse_routers(model: ModelArguments, linear: Collection[str], built: nn.Module) -> None:
    """Raise ValueError where a recipe adapts a router that returns more than its product."""
    targets = model.lora_target_modules
    routers = [
        name
        for name in linear
        if "Router" in type(built.get_submodule(name)).__name__
        and (targets == "all-linear" or _matches(targets, name))
        and not _matches(model.exclude_modules, name)
    ]
    if routers:
        names = " ".join(_ends(routers))
        raise ValueError(
            f"peft does not adapt {names} of {built.config.model_type}, which returns more than a "
            f"product: leave it out with --exclude_modules {names}"
        )


def _refuse_towers(model: ModelArguments, linear: Collection[str], model_type: str) -> None:
    """Raise ValueError where a recipe adapts what sees or hears beside a text model."""
    asked = [name.split(".") for name in linear if is_target(model, name)]
    found = (next((p for p in parts if _SENSES & set(p.split("_"))), None) for parts in asked)
    towers = sorted({part for part in found if part})
    if towers:
        raise ValueError(
            f"lora_target_modules means linears of {', '.join(towers)} of {model_type} too, which "
            f"text never reaches: leave them out with --exclude_modules '.*({'|'.join(towers)}).*'"
        )


def _matches(asked: str | Collection[str] | None, name: str) -> bool:
    """Whether a module's name is among those asked for, as peft compares them."""
    if asked is None:
        return False
    if isinstance(asked, str):
        return bool(re.fullmatch(asked, name))
    return any(_found(one, [name]) for one in asked)


def is_target(model: ModelArguments, name: str) -> bool:
    """Whether a recipe's LoRA adapts the linear of a decoder layer that has this name."""
    targets = model.lora_target_modules
    asked = targets == "all-linear" or _matches(targets, name)
    return asked and not _matches(model.exclude_modules, name)


def _check_excluded(model: ModelArguments, names: Collection[str], built: nn.Module) -> None:
    """Raise ValueError where `exclude_modules` leaves out nothing or everything."""
    excluded, targets = model.exclude_modules, model.lora_target_modules
    if not excluded:
        return
    if isinstance(excluded, str):
        _check_pattern("exclude_modules", excluded, names, type(built).__name__)
    else:
        _check_each("exclude_modules", excluded, [n for n, _ in built.named_modules() if n], built)
    asked = [name for name in names if targets == "all-linear" or _matches(targets, name)]
    left = [name for name in asked if not _matches(excluded, name)]
    if len(left) in (0, len(asked)):
        what = "every layer" if not left else "no layer"
        raise ValueError(
            f"exclude_modules {excluded} leaves out {what} that lora_target_modules asks for: "
            f"it asks for {', '.join(_ends(asked))}"
        )


def _check_targets(targets: str | list[str] | None, names: Collection[str], kind: str) -> None:
    if targets is None or targets == "all-linear":
        return
    if isinstance(targets, str) and not re.fullmatch(r"[\w.]+", targets):
        _check_pattern("lora_target_modules", targets, names, kind)
        return
    listed = [targets] if isinstance(targets, str) else targets
    missing = [target for target in listed if not _found(target, names)]
    if missing:
        raise ValueError(
            f"lora_target_modules {', '.join(missing)}: {kind} has no such linear layer; it has "
            f"{', '.join(_ends(names))}"
        )


def _check_pattern(field: str, pattern: str, names: Collection[str], kind: str) -> None:
    try:
        matches = any(re.fullmatch(pattern, name) for name in names)
    except re.error as error:
        raise ValueError(
            f"{field} {pattern!r} is no pattern ({error}): give names or a regular expression"
        ) from error
    if not matches:
        raise ValueError(
            f"{field} {pattern!r} is a pattern that no module of {kind} matches; one is called "
            f"{next(iter(names))}"
        )


def _check_each(
    field: str, asked: Collection[str] | None, names: Collection[str], built: nn.Module
) -> None:
    missing = [one for one in asked or [] if not _found(one, names)]
    if missing:
        raise ValueError(
            f"{field} {', '.join(missing)}: {type(built).__name__} has no such name; it has "
            f"{', '.join(_ends(names))}"
        )


def _check_parameters(asked: Collection[str] | None, built: nn.Module) -> None:
    """Raise ValueError for a name that is no parameter, or one without two or three dimensions."""
    axes = {name: parameter.ndim for name, parameter in built.named_parameters()}
    fit = [name for name, count in axes.items() if count in (2, 3)]
    for one in asked or []:
        named = [name for name in axes if _found(one, [name])]
        if named and {*named} <= {*fit}:
            continue
        other = next((name for name in named if name not in fit), None)
        why = f"names {other} too, which is no matrix" if other else "is no parameter"
        ends = dict.fromkeys(".".join(name.split(".")[-2:]) for name in fit)
        raise ValueError(
            f"lora_target_parameters {one} {why} of {type(built).__name__}; give one of "
            f"{', '.join(ends)}"
        )


def _check_saved(
    model: ModelArguments, saved: Collection[str], config: PreTrainedConfig, launch: Launch
) -> None:
    """Raise ValueError where whole modules cannot be trained correctly."""
    tied = [name for name in saved if name.rpartition(".")[2] in _TIED]
    if launch.strategy == "fsdp" and tied and getattr(config, "tie_word_embeddings", False):
        raise ValueError(
            f"lora_modules_to_save {', '.join(tied)} shares its weights with the other end of the "
            "model, which FSDP2 cannot shard apart: launch with ddp.yaml, or leave it out"
        )
    if model.load_in_4bit or model.load_in_8bit:
        raise ValueError(
            "lora_modules_to_save would train without float32 copies beside quantized weights: "
            "leave out load_in_4bit and load_in_8bit, or lora_modules_to_save"
        )
    if model.dtype not in (None, "float32"):
        raise ValueError(
            f"lora_modules_to_save would train in {model.dtype} without float32 copies: pass "
            "--dtype float32; the products are in the launch config's precision all the same"
        )


def _found(asked: str, names: Collection[str]) -> bool:
    return any(name == asked or name.endswith(f".{asked}") for name in names)


def _ends(names: Collection[str]) -> list[str]:
    """Returns the last parts of names, without the numbers of layers and the head."""
    ends = {name.rpartition(".")[2] for name in names}
    return sorted(one for one in ends if not one.isdigit() and one != "lm_head")
