"""The base and the tuned model of a finished run, under one load of the weights."""

import argparse
import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sftlab.config.model_overrides import check_overrides
from sftlab.config.recipe import ModelArguments
from sftlab.data.chat_template import end_of_turn, template_hash
from sftlab.data.template_errors import TEMPLATE_ERRORS, is_of_template
from sftlab.data.template_facts import write_day
from sftlab.data.time_limit import time_limit
from sftlab.evaluation.full_models import as_base, hold_base
from sftlab.evaluation.start_model import start_answers
from sftlab.exit_messages import first_line, mistakes_in_one_line
from sftlab.fastpath import varlen_attention
from sftlab.fastpath.experts_lora import take_experts_lora
from sftlab.models.identity import base_identity, tokenizer_identity
from sftlab.models.likelihood import with_fused_head
from sftlab.models.loaded_adapter import refuse_other_tensors
from sftlab.models.loading import load_model, model_init_kwargs, read_tokenizer
from sftlab.models.text_part import unnested
from sftlab.models.trust import FLAG, check_adapter
from sftlab.runs.record import read_run
from sftlab.runs.run_directory import SIDES, START, adapter_hash
from sftlab.schema import BOOLEAN, OBJECT, TEXT, Kind, check, one_of

_TEMPLATE_S = 20
# what loading the models of a run reads from run.json
_NEEDED = {
    "recipe.model_name_or_path": TEXT,
    "recipe.model_revision": TEXT.or_null(),
    "recipe.use_peft": BOOLEAN,
    "recipe.dtype": one_of("bfloat16", "float16", "float32"),
    "recipe.load_in_4bit": BOOLEAN,
    "recipe.load_in_8bit": BOOLEAN,
    "recipe.trust_remote_code": BOOLEAN,
    "recipe.attn_implementation": TEXT.or_null(),
    "recipe.model_init_kwargs": OBJECT.or_null(),
    "template.hash": TEXT,
}


def _is_day(value: object) -> bool:
    try:
        return isinstance(value, str) and date.fromisoformat(value).isoformat() == value
    except ValueError:
        return False


DAY = Kind("a day such as 2026-01-31", _is_day)


def add_trust_flag(parser: argparse.ArgumentParser) -> None:
    """Add the option that lets a base model's own code run. No run can set it."""
    parser.add_argument(
        FLAG, action="store_true", help="run code that the base model brings (default: never)"
    )


@contextmanager
def evaluation_errors(advice: str) -> Iterator[None]:
    """End an evaluation with one line after a mistake, a file that fails, full memory, or TERM.

    `advice` says what to do about the memory. Raises SystemExit.
    """
    before = signal.signal(signal.SIGTERM, _stop)
    with mistakes_in_one_line():
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ValueError(f"out of memory{advice}") from error
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise ValueError(f"{where}{error.strerror or error}") from error
        finally:
            signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"\nstopped: the same command goes on, since answers are kept as they come\n")
    os._exit(128 + number)


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
            f"{folder} did not succeed (status {run['status']}: {run.get('reason')}): train it "
            "first"
        )
    check(run, str(folder / "run.json"), _NEEDED, {"template.day": DAY})
    return run


def run_tokenizer(folder: Path, run: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Load the tokenizer that was saved with the adapter. No code of its own is run.

    A template that writes the day writes that of the training from now on. Raises ValueError where
    the tokenizer has another template than the run trained with.
    """
    if not (folder / "adapter" / "tokenizer_config.json").is_file():
        raise ValueError(
            f"{folder / 'adapter'} holds no tokenizer: it has no tokenizer_config.json"
        )
    tokenizer = read_tokenizer(folder / "adapter")
    if template_hash(tokenizer) != run["template"]["hash"]:
        raise ValueError(
            f"the template in {folder / 'adapter'} is not the one that the run trained with"
        )
    write_day(run["template"].get("day"))
    try:
        with time_limit(_TEMPLATE_S, f"the chat template in {folder / 'adapter'}"):
            end_of_turn(tokenizer)
    except TEMPLATE_ERRORS as error:
        if not is_of_template(error):
            raise
        raise ValueError(
            f"the chat template in {folder / 'adapter'} does not render a question: "
            f"{first_line(error)}"
        ) from error
    return tokenizer


def refuse_unknown_ids(
    model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise ValueError where the tokenizer has ids beyond the model's embedding."""
    size = model.get_input_embeddings().weight.shape[0]
    special = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    largest = max((i for i in special if i is not None), default=0)
    if largest >= size:
        raise ValueError(
            f"the run's tokenizer has the id {largest} for "
            f"{tokenizer.convert_ids_to_tokens(largest)!r}, and the model has {size} embeddings: "
            "the tokenizer in adapter/ is not the one that the run trained with"
        )


def load_pair(
    folder: Path, run: dict[str, Any], trusted: bool = False
) -> PeftModel | PreTrainedModel:
    """Load the base model with the run's adapter, in the dtype of the training.

    After full fine-tuning it is the tuned model, and the base's weights wait beside it. It is on
    the GPU if there is one. `answering` chooses which of the two models answers. `trusted`
    lets code that the base model brings run; only the command line may say so. Raises ValueError
    where the base model or the adapter cannot be loaded.
    """
    recipe = run["recipe"]
    refuse_untrusted(folder, run, trusted)
    arguments = _model_arguments(folder, recipe)
    kwargs = model_init_kwargs(arguments, trusted, recipe["model_init_kwargs"])
    name = arguments.model_name_or_path
    # cuDNN's attention differs from call to call (H200, torch 2.11), and greedy texts with it
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not recipe["use_peft"]:
        return _load_full_pair(folder, arguments, kwargs, device)
    try:
        check_adapter(folder / "adapter")
    except ValueError as error:
        raise ValueError(f"{folder / 'adapter'} does not load on {name}: {error}") from error
    try:
        base = load_model(arguments, kwargs, device)
    except ValueError as error:
        raise ValueError(f"the base model {name} of the run cannot be loaded: {error}") from error
    try:
        model = PeftModel.from_pretrained(with_fused_head(base), folder / "adapter")
    except torch.OutOfMemoryError:
        raise
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise ValueError(
            f"{folder / 'adapter'} does not load on {name}: {first_line(error)}"
        ) from error
    refuse_other_tensors(model, folder / "adapter")
    take_experts_lora(model)  # peft's path copies all experts for every token
    return model.eval()


def _load_full_pair(
    folder: Path, arguments: ModelArguments, kwargs: dict[str, Any], device: str
) -> PreTrainedModel:
    """Load both models of full fine-tuning.

    The base's weights wait on the CPU where the GPU has no room for them.
    """
    if arguments.load_in_4bit or arguments.load_in_8bit:
        raise ValueError(
            f"{folder} is full fine-tuning (use_peft: false), whose weights are not quantized: "
            "leave out load_in_4bit and load_in_8bit"
        )
    name, there = arguments.model_name_or_path, folder / "adapter"
    try:
        tuned = load_model(replace(arguments, model_name_or_path=str(there)), kwargs, device)
    except ValueError as error:
        raise ValueError(f"the tuned model in {there} cannot be loaded: {error}") from error
    try:
        try:
            base = load_model(arguments, kwargs, device)
        except torch.OutOfMemoryError:
            base = load_model(arguments, kwargs, "cpu")
        hold_base(tuned, unnested(base))
    except ValueError as error:
        raise ValueError(f"the base model {name} of the run cannot be loaded: {error}") from error
    return with_fused_head(tuned).eval()


def refuse_untrusted(folder: Path, run: dict[str, Any], trusted: bool) -> None:
    """Raise ValueError where a run was trained with remote code and this command gives no trust."""
    recipe = run["recipe"]
    if recipe["trust_remote_code"] and not trusted:
        raise ValueError(
            f"{folder} says trust_remote_code: true, so its base model "
            f"{recipe['model_name_or_path']} brings code of its own, which is not run: pass {FLAG} "
            "on the command line if you trust that code"
        )
    check_overrides(recipe["model_init_kwargs"])


def _model_arguments(folder: Path, recipe: dict[str, Any]) -> ModelArguments:
    known = {name: recipe[name] for name in ModelArguments.__dataclass_fields__ if name in recipe}
    try:
        arguments = ModelArguments(**known)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'run.json'}, recipe: {error}") from error
    if arguments.attn_implementation == varlen_attention.NAME:  # it needs packed rows
        arguments.attn_implementation = None
    return arguments


def answering(model: PeftModel | PreTrainedModel, side: str) -> AbstractContextManager:
    """Let the model answer as `side`: base (without adapter, or with its own weights) or tuned.

    As start it answers where sftlab/evaluation/start_model.py has loaded what the run started from.
    """
    assert side in (*SIDES, START)
    if side == "tuned":
        return nullcontext()
    if side == START:
        return start_answers(model)
    return model.disable_adapter() if isinstance(model, PeftModel) else as_base(model)


def model_settings(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Returns what the answers of a run's models depend on, beside prompts and generation.

    That is the identity of the base model, of the adapter (weights and config), of the tokenizer
    and of the template, and how the base model is loaded.
    """
    names = (
        "model_name_or_path",
        "model_revision",
        "dtype",
        "load_in_4bit",
        "load_in_8bit",
        "model_init_kwargs",
    )
    recipe = run["recipe"]
    day = {"day": run["template"]["day"]} if "day" in run["template"] else {}
    return (
        {name: recipe[name] for name in names}
        | day
        | {
            "base": base_identity(recipe["model_name_or_path"], recipe["model_revision"]),
            "adapter_hash": adapter_hash(folder),
            "tokenizer": tokenizer_identity(folder / "adapter"),
            "template": run["template"]["hash"],
        }
    )
