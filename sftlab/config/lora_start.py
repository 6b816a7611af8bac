"""How the LoRA matrices begin: which ways there are, and what each allows.

PiSSA (Meng et al. 2024, arXiv 2404.02948) and OLoRA (Buyukakyuz 2024, arXiv 2406.01775) take the
largest parts of each weight into the adapter and leave the rest as frozen weights. What is saved is
converted, so that it belongs to the base model as it is (models/plain_adapter.py).
"""

import re

from sftlab.config.launch import Launch
from sftlab.config.recipe import ModelArguments

DEFAULT = "true"
_KNOWN = re.compile(r"true|gaussian|orthogonal|pissa|pissa_niter_[1-9]\d*|olora")
_NOT_HERE = {
    "false": "the untrained adapter would change the model",
    "eva": "it reads the data before the first step: pissa reads the weights alone",
    "corda": "it reads the data before the first step: pissa reads the weights alone",
    "lora_ga": "it takes gradients before the first step: pissa reads the weights alone",
    "loftq": "it rounds the base model in its own way: use load_in_4bit, or pissa without it",
    "mica": "it freezes one of the two matrices",
}


def changes_base(init: str) -> bool:
    """Whether a way to begin takes parts of the base model's weights into the adapter."""
    return init.startswith(("pissa", "olora"))


def check_start(model: ModelArguments, launch: Launch, mixed_precision: str) -> None:
    """Raise ValueError for a way to begin that is unknown, or not possible with other fields."""
    init = model.init_lora_weights
    if not _KNOWN.fullmatch(init):
        why = f": {_NOT_HERE[init]}" if init in _NOT_HERE else ""
        raise ValueError(
            f"init_lora_weights {init} is not possible here{why}; expected true, gaussian, "
            "orthogonal, pissa, pissa_niter_N or olora"
        )
    if init != DEFAULT and (other := _other_field(model)):
        raise ValueError(
            f"init_lora_weights {init} does not go with {other}: leave one of them out"
        )
    if init == "orthogonal" and model.lora_r % 2:
        raise ValueError(
            f"init_lora_weights orthogonal needs an even rank, and lora_r is {model.lora_r}"
        )
    if changes_base(init) and launch.strategy == "fsdp":
        raise ValueError(
            f"init_lora_weights {init} changes the weights that FSDP2 shards: launch with ddp.yaml"
        )
    if changes_base(init) and mixed_precision == "fp8":
        raise ValueError(
            f"init_lora_weights {init} and fp8 both change the frozen weights: launch with "
            "single.yaml"
        )


def _other_field(model: ModelArguments) -> str | None:
    """Returns a field that asks for something which only the default way to begin allows."""
    init = model.init_lora_weights
    fields = {
        "load_in_4bit": init != "gaussian" and model.load_in_4bit,
        "load_in_8bit": init != "gaussian" and model.load_in_8bit,
        "adapter_name_or_path": bool(model.adapter_name_or_path),
        "lora_bias": model.lora_bias,
        "lora_target_parameters": bool(model.lora_target_parameters),
        "use_dora": changes_base(init) and model.use_dora,
        "use_peft: false": not model.use_peft,
    }
    return next((name for name, there in fields.items() if there), None)
