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
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.fastpath import varlen_attention
from sftlab.models.likelihood import with_fused_head
from sftlab.models.loading import model_init_kwargs
from sftlab.runs.run_directory import SIDES, adapter_hash, read_run


@contextmanager
def evaluation_errors(advice: str) -> Iterator[None]:
    """End an evaluation with one line after a user's mistake or an out-of-memory error.

    `advice` says what to do about the memory. Raises SystemExit.
    """
    with mistakes_in_one_line():
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ValueError(f"out of memory{advice}") from error


def finished_run(folder: Path) -> dict[str, Any]:
    """Read run.json of a run that succeeded and saved its adapter. Raises ValueError otherwise."""
    run = read_run(folder)
    if run["recipe"].get("save_adapter") is False:
        raise ValueError(
            f"{folder} saved no adapter (save_adapter: false): train it again with "
            "save_adapter: true"
        )
    if run["status"] != "succeeded":
        raise ValueError(
            f"{folder} did not succeed (status {run['status']}: {run['reason']}): train it first"
        )
    return run


def run_tokenizer(folder: Path, run: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Load the tokenizer that was saved with the adapter.

    Raises ValueError where it has another template than the run trained with.
    """
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
    """Load the base model with the run's adapter, in the dtype of the training.

    It is on the GPU if there is one. `answering` chooses which of the two models answers. Raises
    ValueError where the base model or the adapter cannot be loaded.
    """
    recipe = run["recipe"]
    arguments = ModelArguments(
        **{name: recipe[name] for name in ModelArguments.__dataclass_fields__}
    )
    if arguments.attn_implementation == varlen_attention.NAME:  # it needs packed rows
        arguments.attn_implementation = None
    kwargs = model_init_kwargs(arguments, recipe["trust_remote_code"], recipe["model_init_kwargs"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # cuDNN's attention differs from call to call (H200, torch 2.11), and greedy texts with it
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
    """Let the model answer as `side`: base (the adapter is disabled) or tuned."""
    assert side in SIDES
    return model.disable_adapter() if side == "base" else nullcontext()


def model_settings(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a run that its models' answers depend on."""
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
