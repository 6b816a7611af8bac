"""How the LoRA matrices begin: which ways there are, and what each allows.

PiSSA (Meng et al. 2024, arXiv 2404.02948) and OLoRA (Buyukakyuz 2024, arXiv 2406.01775) take the
largest parts of each weight into the adapter and leave the rest as frozen weights. What is saved is
converted, so that it belongs to the base model as it is (models/plain_adapter.py).

EVA reads training rows first (training/eva.py), LoftQ the weights before they are rounded to 4 bits
(models/loftq.py). Both leave the frozen weights alone.
"""

import re

from sftlab.config.launch import Launch
from sftlab.config.recipe import ModelArguments

DEFAULT = "true"
_KNOWN = re.compile(r"true|gaussian|orthogonal|pissa|pissa_niter_[1-9]\d*|olora|eva|loftq")
_NAMES = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "eva": "EVA",
    "loftq": "LoftQ",
    "gaussian": "gaussian matrices",
    "orthogonal": "orthogonal matrices",
}
_NOT_HERE = {
    "false": "the untrained adapter would change the model",
    "corda": "eva reads the data before the first step too",
    "lora_ga": "it takes gradients before the first step: eva reads the data alone",
    "mica": "it freezes one of the two matrices",
}


def changes_base(init: str) -> bool:
    """Whether a way to begin takes parts of the base model's weights into the adapter."""
    return init.startswith(("pissa", "olora"))


def saved_rank(init: str, rank: int) -> int:
    """Returns the rank of the saved adapter of a run with the rank `rank`."""
    return 2 * rank if changes_base(init) else rank


def begin_words(init: str) -> str:
    """Returns a way to begin as a text names it, such as PiSSA (pissa_niter_16)."""
    known = next((one for one in _NAMES if init.startswith(one)), None)
    if known is None:
        return init
    return _NAMES[known] if init == known else f"{_NAMES[known]} ({init})"


def reads_first(init: str) -> bool:
    """Whether a way to begin reads rows or exact weights once the model is loaded."""
    return init in ("eva", "loftq")


def check_start(
    model: ModelArguments, launch: Launch, mixed_precision: str, streaming: bool
) -> None:
    """Raise ValueError for a way to begin that is unknown, or not possible with other fields."""
    init = model.init_lora_weights
    if not _KNOWN.fullmatch(init):
        why = f": {_NOT_HERE[init]}" if init in _NOT_HERE else ""
        raise ValueError(
            f"init_lora_weights {init} is not possible here{why}; expected true, gaussian, "
            "orthogonal, pissa, pissa_niter_N, olora, eva or loftq"
        )
    if init != DEFAULT and (other := _other_field(model)):
        raise ValueError(
            f"init_lora_weights {init} does not go with {other}: leave one of them out"
        )
    if init == "orthogonal" and model.lora_r % 2:
        raise ValueError(
            f"init_lora_weights orthogonal needs an even rank, and lora_r is {model.lora_r}"
        )
    if init == "loftq" and not model.load_in_4bit:
        raise ValueError(
            "init_lora_weights loftq begins with what rounding to 4 bits takes away: add "
            "load_in_4bit: true"
        )
    if init == "eva" and streaming:
        raise ValueError(
            "init_lora_weights eva reads training rows before the first step, in a random order: "
            "leave out dataset_streaming"
        )
    if reads_first(init) and launch.strategy == "fsdp":
        raise ValueError(
            f"init_lora_weights {init} needs the whole model on every process: launch with ddp.yaml"
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
        "load_in_4bit": init not in ("gaussian", "eva", "loftq") and model.load_in_4bit,
        "load_in_8bit": init not in ("gaussian", "eva") and model.load_in_8bit,
        "adapter_name_or_path": bool(model.adapter_name_or_path),
        "lora_bias": model.lora_bias,
        "lora_target_parameters": bool(model.lora_target_parameters),
        "use_dora": (changes_base(init) or init == "loftq") and model.use_dora,
        "use_peft: false": not model.use_peft,
    }
    return next((name for name, there in fields.items() if there), None)
