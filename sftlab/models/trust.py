"""What is trusted? Nothing that is read runs code, unless the command line says so this time.

A base model, an adapter, a run and a template are data. Weights are safetensors. The checks here
come before anything is handed to transformers or peft, and name file and key.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from peft import LoraConfig

from sftlab.schema import TEXT, list_of, read_object, shown

FLAG = "--trust_remote_code"
MOST_ALPHA = 1_000_000
TEXTS = list_of(TEXT)
# Keys of adapter_config.json that may hold values. Every other key of peft's LoraConfig must be
# empty: some name modules to import or other adapters, others change the base model.
_ADAPTER_KEYS = frozenset(
    {
        "task_type",
        "peft_type",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "bias",
        "use_rslora",
        "modules_to_save",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "megatron_core",  # read only where megatron_config is set
        "trainable_token_indices",
        "use_dora",
        "qalora_group_size",  # read only where use_qalora is set
        "lora_bias",
        "target_parameters",
        "ensure_weight_tying",
    }
)


def check_base_folder(folder: Path, trusted: bool, with_weights: bool = True) -> None:
    """Raise ValueError where a local base model would load something else, or kernels of the hub.

    Something else is pickled weights, and an adapter beside the model. transformers itself refuses
    code of the folder's own (auto_map) without trust. `with_weights` asks for weights, too.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"base model {folder} holds no config.json: give a model's folder, or its name on the "
            "hub"
        )
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"base model {folder} holds an adapter (adapter_config.json), which transformers would "
            "put on top without a word: merge it, or give the folder of the base model alone"
        )
    if with_weights:
        _check_weights(folder)
    config = read_object(folder / "config.json")
    if not isinstance(config.get("transformers_weights", ""), str) or not config.get(
        "transformers_weights", ".safetensors"
    ).endswith((".safetensors", ".safetensors.index.json")):
        raise ValueError(
            f"{folder / 'config.json'}, transformers_weights: got "
            f"{config['transformers_weights']!r}, expected a .safetensors file"
        )
    if not trusted:
        for key in ("attn_implementation", "_attn_implementation"):
            refuse_hub_kernels(config.get(key), f"{folder / 'config.json'}, {key}")


def _check_weights(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"base model {folder} holds no .safetensors file: pickled weights are not loaded"
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = read_object(index).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise ValueError(f"{index} has no weight_map: expected tensor names and their files")
        for tensor, file in files.items():
            if not isinstance(file, str) or not file.endswith(".safetensors") or "/" in file:
                raise ValueError(
                    f"{index}, weight_map, {tensor}: got {shown(file)}, expected a .safetensors "
                    "file of the same folder"
                )


def refuse_hub_kernels(attention: object, where: str) -> None:
    """Raise ValueError for an attention that is code from the hub, such as org/kernel."""
    if isinstance(attention, str) and "/" in attention:
        raise ValueError(
            f"{where}: {attention!r} is code from the hub, which is not run; pass {FLAG} on the "
            "command line if you trust it"
        )


def check_adapter(folder: Path) -> dict[str, Any]:
    """Returns adapter_config.json of a LoRA adapter that is data alone.

    Raises ValueError that names file and key for anything else.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no adapter: it has no adapter_config.json")
    config = read_object(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{path}, peft_type: got {shown(config.get('peft_type'))}, expected 'LORA'"
        )
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for key, value in config.items():
        if key not in known:
            raise ValueError(f"{path}, {key}: peft's LoraConfig here has no such key; remove it")
        if key == "auto_mapping" and _of_transformers(value):
            continue
        if key not in _ADAPTER_KEYS and value not in (None, False, {}, []):
            raise ValueError(
                f"{path}, {key}: got {shown(value)}, expected nothing; sft.py does not write it, "
                "and it is not loaded"
            )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"{path}, task_type: got {shown(config['task_type'])}, expected 'CAUSAL_LM'"
        )
    _check_numbers(path, config)
    _check_names(path, config)
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        raise ValueError(
            f"{path}, init_lora_weights: got {shown(config['init_lora_weights'])}, expected true "
            "or false; others change the base model"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"{folder} holds no adapter_model.safetensors: pickled weights are not loaded"
        )
    return config


def _of_transformers(mapping: object) -> bool:
    """Whether an auto_mapping names a class of transformers, as peft writes it."""
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    return isinstance(library, str) and library.startswith("transformers.models.")


def _check_numbers(path: Path, config: dict[str, Any]) -> None:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not _is_rank(rank):
        raise ValueError(f"{path}, r: got {shown(rank)}, expected a whole number of at least 1")
    if not _is_scale(alpha):
        raise ValueError(f"{path}, lora_alpha: got {shown(alpha)}, expected a number above 0")
    dropout = config.get("lora_dropout", 0.0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ValueError(
            f"{path}, lora_dropout: got {shown(dropout)}, expected a number from 0 to below 1"
        )
    for key, holds in (("rank_pattern", _is_rank), ("alpha_pattern", _is_scale)):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(holds, pattern.values())):
            raise ValueError(
                f"{path}, {key}: got {shown(pattern)}, expected names of modules with a number each"
            )


def _is_rank(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_scale(value: object) -> bool:
    """Whether a value can be a lora_alpha, as a recipe's can."""
    return type(value) in (int, float) and 0 < value <= MOST_ALPHA


def _check_names(path: Path, config: dict[str, Any]) -> None:
    for key in ("target_modules", "modules_to_save", "exclude_modules", "target_parameters"):
        names = config.get(key)
        if isinstance(names, str) and key in ("target_modules", "exclude_modules"):
            try:
                re.compile(names)
            except re.error as error:
                raise ValueError(f"{path}, {key}: {shown(names)} is no pattern: {error}") from error
        elif names is not None and not TEXTS.holds(names):
            raise ValueError(f"{path}, {key}: got {shown(names)}, expected a list of names")
