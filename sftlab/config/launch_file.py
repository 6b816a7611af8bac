"""Is a launch config one that accelerate can launch? Read it before accelerate does.

accelerate answers a mistake with a traceback, or launches something else.
"""

import os
from pathlib import Path
from typing import Any

from sftlab.field_words import near_name
from sftlab.yaml_files import read_yaml

LAUNCH_HINT = "give one of accelerate_configs/, for example accelerate_configs/single.yaml"
_ENVIRONMENTS = ("LOCAL_MACHINE",)
_DISTRIBUTED = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")
_PRECISIONS = ("no", "fp16", "bf16", "fp8")
_COUNTS = ("num_processes", "num_machines")
_NUMBERS = ("machine_rank", "main_process_port")
_SWITCHES = (
    *("use_cpu", "debug", "same_network", "enable_cpu_affinity", "downcast_bf16"),
    *("tpu_use_cluster", "tpu_use_sudo"),
)
_MAPPINGS = ("fp8_config", "fsdp_config", "dynamo_config", "mpirun_config", "parallelism_config")
FSDP_SWITCHES = (
    *("fsdp_reshard_after_forward", "fsdp_offload_params", "fsdp_forward_prefetch"),
    *("fsdp_use_orig_params", "fsdp_cpu_ram_efficient_loading", "fsdp_sync_module_states"),
    *("fsdp_activation_checkpointing", "fsdp_activation_checkpointing_offload"),
)
FSDP_CHOICES = {
    "fsdp_version": (1, 2),
    "fsdp_auto_wrap_policy": ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"),
    "fsdp_state_dict_type": ("FULL_STATE_DICT", "LOCAL_STATE_DICT", "SHARDED_STATE_DICT"),
    "fsdp_backward_prefetch": ("BACKWARD_PRE", "BACKWARD_POST", "NO_PREFETCH"),
    "fsdp_sharding_strategy": (
        *("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2"),
    ),
}
FSDP_OTHERS = ("fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap")
_WORDS = ("gpu_ids", "main_process_ip", "rdzv_backend", "main_training_function")
_UNUSED = {
    "deepspeed_config": "DeepSpeed is not supported: fsdp.yaml shards with FSDP2",
    "megatron_lm_config": "Megatron-LM is not supported",
    "tpu_name": "TPUs are not supported",
    "tpu_zone": "TPUs are not supported",
    "command_file": "TPUs are not supported",
    "commands": "TPUs are not supported",
    "tpu_vm": "TPUs are not supported",
    "tpu_env": "TPUs are not supported",
}
KEYS = (
    *("compute_environment", "distributed_type", "mixed_precision"),
    *(*_COUNTS, *_NUMBERS, *_SWITCHES, *_MAPPINGS, *_WORDS, *_UNUSED),
)


def read_launch_config(path: str | os.PathLike, folder: Path = Path()) -> dict[str, Any]:
    """Returns the keys of a launch config; a relative path is taken from `folder`.

    Raises ValueError that names file and key for one that is unknown, or holds what it should not.
    """
    config = read_yaml(path, "launch config", LAUNCH_HINT, folder)
    for key, value in config.items():
        if key not in KEYS:
            near = near_name(key, KEYS)
            hint = f"; did you mean {near!r}?" if near else f": {LAUNCH_HINT}"
            raise ValueError(f"{path}: unknown key {key!r}{hint}")
        if value and key in _UNUSED:
            raise ValueError(f"{path}: {key} is set, and {_UNUSED[key]}")
        if key == "distributed_type" and value is False:
            raise ValueError(f"{path}: YAML reads {key}: NO as false: write 'NO' in quotes")
        if value is not None and (expected := _expected(key, value)):
            raise ValueError(f"{path}: {key} is {value!r}: expected {expected}")
    if config.get("distributed_type") is None:
        raise ValueError(f"{path} has no distributed_type: expected {' or '.join(_DISTRIBUTED)}")
    for key, value in (config.get("fsdp_config") or {}).items():
        _check_fsdp(path, key, value)
    return config


def _check_fsdp(path: str | os.PathLike, key: str, value: Any) -> None:
    """Raise ValueError for a line of `fsdp_config` that accelerate would misread."""
    known = (*FSDP_SWITCHES, *FSDP_CHOICES, *FSDP_OTHERS)
    if key not in known:
        near = near_name(key if key.startswith("fsdp") else f"fsdp_{key}", known)
        hint = f"; did you mean {near!r}?" if near else f": expected some of {', '.join(known)}"
        raise ValueError(f"{path}: fsdp_config has the unknown key {key!r}{hint}")
    choices = FSDP_CHOICES.get(key, ())
    checks = dict.fromkeys(FSDP_SWITCHES, (_is_switch(value), "true or false")) | {
        "fsdp_min_num_params": (type(value) is int and value >= 0, "a whole number of at least 0"),
        "fsdp_transformer_layer_cls_to_wrap": (isinstance(value, str), "the name of a class"),
    }
    choices_hold = (type(value) in (int, str) and value in choices, " or ".join(map(str, choices)))
    right, expected = checks.get(key, choices_hold)
    if value is not None and not right:
        raise ValueError(f"{path}: fsdp_config.{key} is {value!r}: expected {expected}")


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool) or value in ("no", "yes", "true", "false")


def _expected(key: str, value: Any) -> str | None:
    """Returns what a key should hold; None where it does."""
    whole = type(value) is int
    precision = "no" if value is False else value  # YAML reads an unquoted no so
    checks = {
        "compute_environment": (value in _ENVIRONMENTS, " or ".join(_ENVIRONMENTS)),
        "distributed_type": (value in _DISTRIBUTED, " or ".join(_DISTRIBUTED)),
        "mixed_precision": (precision in _PRECISIONS, " or ".join(_PRECISIONS)),
        "main_process_port": (whole and 0 <= value < 2**16, "a port from 0 to 65535"),
    }
    checks |= dict.fromkeys(_COUNTS, (whole and value >= 1, "a whole number of at least 1"))
    checks |= {"machine_rank": (whole and value >= 0, "a whole number of at least 0")}
    checks |= dict.fromkeys(_SWITCHES, (_is_switch(value), "true or false"))
    checks |= dict.fromkeys(_MAPPINGS, (isinstance(value, dict), "lines of name: value"))
    checks |= dict.fromkeys(_WORDS, (isinstance(value, str | int), "a word"))
    right, expected = checks.get(key, (True, ""))
    return None if right else expected
