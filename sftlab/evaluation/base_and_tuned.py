"""The base and the tuned model of a finished run, under one load of the weights."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import get_quantization_config

from sftlab.config.recipe import ModelArguments
from sftlab.data.chat_template import template_hash
from sftlab.fastpath import varlen_attention
from sftlab.models.likelihood import with_fused_head
from sftlab.models.loading import model_init_kwargs
from sftlab.runs.run_directory import SIDES, adapter_hash, read_run


@contextmanager
def one_sentence(out_of_memory: str) -> Iterator[None]:
    """A mistake (ValueError), or a GPU without room, ends the script with a sentence:

    SystemExit.
    """
    try:
        yield
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"error: out of memory{out_of_memory}") from error


def finished_run(folder: Path) -> dict[str, Any]:
    """run.json of a run that succeeded and kept its adapter; ValueError otherwise."""
    run = read_run(folder)
    if run["recipe"].get("save_adapter") is False:
        raise ValueError(
            f"{folder} kept nothing of what it trained (save_adapter: false): train it with an "
            "adapter first"
        )
    if run["status"] != "succeeded":
        raise ValueError(
            f"{folder} did not succeed (status {run['status']}: {run['reason']}): train it first"
        )
    return run


def run_tokenizer(folder: Path, run: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer saved with the adapter, its template the one that the run trained with."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / 'adapter'} holds no tokenizer: {str(error).splitlines()[0]}"
        ) from error
    if template_hash(tokenizer) != run["template"]["hash"]:
        raise ValueError(
            f"the template in {folder / 'adapter'} is not the one that the run trained with"
        )
    return tokenizer


def load_pair(folder: Path, run: dict[str, Any]) -> PeftModel:
    """The base model with the run's adapter on it, on the GPU if there is one, in the dtype that
    the run trained in.

    `answering` says which of the two answers. ValueError where the base model or the adapter cannot
    be loaded.
    """
    recipe = run["recipe"]
    arguments = ModelArguments(
        **{name: recipe[name] for name in ModelArguments.__dataclass_fields__}
    )
    if arguments.attn_implementation == varlen_attention.NAME:  # for the packed rows of a training
        arguments.attn_implementation = None
    kwargs = model_init_kwargs(arguments, recipe["trust_remote_code"], recipe["model_init_kwargs"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # cuDNN's attention gives other values from call to call (H200, torch 2.11): greedy texts would
    # differ each time
    torch.backends.cuda.enable_cudnn_sdp(False)
    name, quantization = recipe["model_name_or_path"], get_quantization_config(arguments)
    try:
        base = AutoModelForCausalLM.from_pretrained(
            name, device_map=device, quantization_config=quantization, **kwargs
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"the base model {name} of the run cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    try:
        model = PeftModel.from_pretrained(with_fused_head(base), folder / "adapter")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{folder / 'adapter'} does not load on {name}: {str(error).splitlines()[0]}"
        ) from error
    return model.eval()


def answering(model: PeftModel, side: str) -> AbstractContextManager:
    """Inside it the model answers as `side`: base (the adapter switched off) or tuned."""
    assert side in SIDES
    return model.disable_adapter() if side == "base" else nullcontext()


def model_settings(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Whatever of a run decides what its two models answer: names a file of answers."""
    names = (
        "model_name_or_path",
        "model_revision",
        "dtype",
        "load_in_4bit",
        "load_in_8bit",
        "model_init_kwargs",
    )
    settings = {name: run["recipe"][name] for name in names}
    return settings | {"adapter_hash": adapter_hash(folder), "template": run["template"]["hash"]}
