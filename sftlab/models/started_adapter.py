"""An adapter that a training goes on from, instead of a new one."""

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from sftlab.config.recipe import ModelArguments
from sftlab.files import file_hash
from sftlab.models.loaded_adapter import refuse_other_tensors
from sftlab.models.trust import check_adapter

# fields of the recipe that the adapter has decided already: (recipe's, adapter_config.json's)
_DECIDED = (
    ("lora_r", "r"),
    ("lora_alpha", "lora_alpha"),
    ("lora_target_modules", "target_modules"),
    ("lora_target_parameters", "target_parameters"),
    ("lora_modules_to_save", "modules_to_save"),
    ("use_rslora", "use_rslora"),
    ("use_dora", "use_dora"),
    ("lora_bias", "lora_bias"),
    ("exclude_modules", "exclude_modules"),
)


def adapter_folder(path: str) -> Path:
    """Returns the folder of an adapter, given itself or a run's directory."""
    inner = Path(path) / "adapter"
    return inner if inner.is_dir() else Path(path)


def started_from(model: ModelArguments) -> dict[str, Any]:
    """Returns the path and the weights' hash of the adapter to go on from; {} without one.

    Raises ValueError for a folder without an adapter, one that is not data alone, and one with
    another shape than the recipe says.
    """
    if model.adapter_name_or_path is None:
        return {}
    if not model.use_peft:
        raise ValueError("adapter_name_or_path needs use_peft: true, or leave it out")
    folder = adapter_folder(model.adapter_name_or_path)
    if not folder.is_dir():
        raise ValueError(
            f"adapter_name_or_path {model.adapter_name_or_path} not found: give a run's directory "
            "or an adapter's folder"
        )
    found = check_adapter(folder)
    for ours, theirs in _DECIDED:
        asked, made = getattr(model, ours), found.get(theirs)
        if asked != "all-linear" and _comparable(asked) != _comparable(made):
            raise ValueError(
                f"{ours} is {asked}, and the adapter in {folder} has {made}: give the adapter's"
            )
    weights = file_hash(folder / "adapter_model.safetensors")[:16]
    return {"started_from": {"adapter": str(folder), "weights": weights}}


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, list | set | tuple) else value or None


def with_adapter(base: PreTrainedModel, model: ModelArguments) -> PreTrainedModel | PeftModel:
    """Returns the base model with the adapter to go on from, which trains; itself without one.

    The dropout is the recipe's. Raises ValueError for an adapter of another base model.
    """
    if model.adapter_name_or_path is None:
        return base
    folder = adapter_folder(model.adapter_name_or_path)
    config = LoraConfig.from_pretrained(folder)
    config.lora_dropout, config.inference_mode = model.lora_dropout, False
    try:
        found = PeftModel.from_pretrained(base, folder, is_trainable=True, config=config)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the adapter in {folder} does not fit {model.model_name_or_path}: it was trained on "
            f"{config.base_model_name_or_path}"
        ) from error
    refuse_other_tensors(found, folder)
    return found
