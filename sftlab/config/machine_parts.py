"""Does this machine have what a recipe names: tracker, optimizer, attention, quantization?

Asked before anything is loaded, and only where the training will run: planning for another machine
does not ask.
"""

from importlib.util import find_spec

import torch
from torch import nn
from transformers import Trainer
from transformers.integrations import get_reporting_integration_callbacks

from sftlab.config.recipe import Recipe, TrainingArguments

# attn_implementation: the package that has it
_ATTENTION = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn.cute",
}


def check_machine_parts(recipe: Recipe) -> None:
    """Raise ValueError for the first thing that the recipe names and this machine lacks."""
    _check_trackers(recipe.training)
    _check_optimizer(recipe.training)
    _check_attention(recipe.model.attn_implementation)
    if (recipe.model.load_in_4bit or recipe.model.load_in_8bit) and not find_spec("bitsandbytes"):
        raise ValueError(
            "load_in_4bit and load_in_8bit need bitsandbytes, which is not installed: "
            "pip install bitsandbytes, or leave them out"
        )


def _check_trackers(training: TrainingArguments) -> None:
    for name in training.report_to or []:
        try:
            for tracker in get_reporting_integration_callbacks([name]):
                tracker()
        except (ImportError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"report_to {name} cannot be used here: {_in_one_line(error)} Install it, or pass "
                "--report_to tensorboard"
            ) from error


def _check_optimizer(training: TrainingArguments) -> None:
    """Build the optimizer for one parameter of its own, if it can be built without the model."""
    name = training.optim.value
    parameter = nn.Parameter(torch.zeros(2, 2))
    try:
        optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(training, None)
        optimizer([parameter], **settings)
    except (ImportError, ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        if "pass a model" in f"{error}" or "pass a `model`" in f"{error}":
            return
        raise ValueError(
            f"optim {name} cannot be used here with optim_args {training.optim_args or 'unset'}: "
            f"{_in_one_line(error)} Another optimizer is --optim adamw_torch_fused"
        ) from error


def _check_attention(name: str | None) -> None:
    package = _ATTENTION.get(name or "")
    if package is None:
        return
    if not find_spec(package.split(".")[0]):
        raise ValueError(
            f"attn_implementation {name} needs the package {package}, which is not installed: "
            "leave attn_implementation out, and packed rows take PyTorch's own FlashAttention"
        )
    if not torch.cuda.is_available():
        raise ValueError(
            f"attn_implementation {name} needs a GPU, and this machine shows none: leave it out"
        )


def _in_one_line(error: Exception) -> str:
    text = " ".join(f"{error}".split()).rstrip(".") or type(error).__name__
    return f"{text}."
