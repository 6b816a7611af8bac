"""The command with which vLLM serves a run: base model and adapter side by side, by name."""

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from transformers import GenerationConfig, PreTrainedTokenizerBase

from sftlab.data.chat_template import end_of_turn
from sftlab.export.formats import adapted_layers, generation_config, refuse_for_vllm
from sftlab.models.loading import read_config

BASE, TUNED = "base", "tuned"
INSTALL = (
    "python -m venv .venv-vllm && .venv-vllm/bin/pip install -r requirements-vllm.txt, then give "
    "--vllm .venv-vllm/bin/vllm"
)


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    port: int


def find_vllm(given: str | None) -> str:
    """Returns the vllm program: the given one, the environment's SFTLAB_VLLM, or that on the path.

    vLLM pins its own torch, so it has an environment of its own. Raises ValueError where it is
    missing.
    """
    asked = given or os.environ.get("SFTLAB_VLLM") or "vllm"
    found = shutil.which(asked)
    if found is None:
        raise ValueError(
            f"there is no program {asked}: install vLLM beside this project: {INSTALL}"
        )
    return found


def write_settings(
    folder: Path, recipe: dict[str, Any], tokenizer: PreTrainedTokenizerBase, trusted: bool
) -> None:
    """Write the run's chat template and a generation config with the template's end tokens.

    vLLM reads both from a folder; the base model's own may be others.
    """
    base, revision = recipe["model_name_or_path"], recipe["model_revision"]
    config = read_config(base, revision, trusted)
    try:
        own = GenerationConfig.from_pretrained(base, revision=revision)
    except OSError:  # it has none
        own = GenerationConfig.from_model_config(config)
    ends = end_of_turn(tokenizer, own.eos_token_id).end_tokens
    generation_config(own, tokenizer, ends).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(tokenizer.get_chat_template(), encoding="utf-8")


def refuse_unserved(adapter: Path, recipe: dict[str, Any]) -> int:
    """Returns the rank that vLLM is told of a run's adapter.

    Raises ValueError for a run that vLLM does not serve.
    """
    if not recipe["use_peft"]:
        raise ValueError(
            f"{adapter.parent} is full fine-tuning, without an adapter: export it with "
            "recipes/export.py --to merged, and start `vllm serve` on that folder"
        )
    return refuse_for_vllm(adapter)


def vllm_command(
    program: str, adapter: Path, recipe: dict[str, Any], settings: Path, address: Address
) -> list[str]:
    """Returns the command that serves the run's base model as `base` and its adapter as `tuned`.

    `settings` is the folder of `write_settings`. Raises ValueError for an adapter that vLLM does
    not take.
    """
    rank, revision = refuse_unserved(adapter, recipe), recipe["model_revision"]
    return [
        *(program, "serve", recipe["model_name_or_path"], "--served-model-name", BASE),
        *(("--revision", revision) if revision else ()),
        *("--tokenizer", str(adapter), "--dtype", recipe["dtype"]),
        *("--enable-lora", "--max-lora-rank", str(rank)),
        *("--lora-modules", f"{TUNED}={adapter}"),
        # vLLM prepares all layers otherwise; its CPU build then ends where it is asked for the
        # log-probabilities of a prompt, as it adapts lm_head
        *("--lora-target-modules", *adapted_layers(adapter)),
        *("--chat-template", str(settings / "chat_template.jinja")),
        *("--generation-config", str(settings)),
        *("--host", address.host, "--port", str(address.port)),
    ]


def vllm_environment(host: str) -> dict[str, str]:
    """Returns the environment of vLLM, with the key that its clients must send, if there is one.

    The key is VLLM_API_KEY or OPENAI_API_KEY. A command line would show it to everybody on the
    machine. Raises ValueError where other machines could ask without a key.
    """
    key = os.environ.get("VLLM_API_KEY") or os.environ.get("OPENAI_API_KEY")
    if key is None and host not in ("127.0.0.1", "localhost", "::1"):
        raise ValueError(
            f"--host {host} lets other machines in: set VLLM_API_KEY to a key that they must send"
        )
    given = {"VLLM_API_KEY": key} if key else {}
    return os.environ | {"VLLM_NO_USAGE_STATS": "1"} | given
