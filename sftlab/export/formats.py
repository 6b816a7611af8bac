"""What is written: merged weights, or an adapter that others load."""

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sftlab.data.chat_template import pad_id
from sftlab.evaluation.generation import turn_of
from sftlab.export.vllm_ranks import VLLM_RANKS, served_rank
from sftlab.files import write_json
from sftlab.models.inner_model import inner_model
from sftlab.models.loading import model_class, read_config
from sftlab.models.text_part import unnested
from sftlab.schema import read_object

# beginnings (init_lora_weights) after which the base model's weights are as they were
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def merge(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    ends: list[int],
) -> PreTrainedModel:
    """Returns the model in a dtype, with the adapter merged in and `ends` as its end tokens.

    Each weight is rounded once, as the sum of base and adapter. Of a checkpoint that takes images
    too it is the text model alone.

    Raises ValueError where a merged weight is not finite, and for biases that find no place.
    """
    _refuse_biases(model)
    generation = generation_config(inner_model(model).generation_config, tokenizer, ends)
    loaded, written = inner_model(model).dtype, getattr(torch, dtype)
    wide = torch.promote_types(loaded, written)
    merged = model if wide == loaded else model.to(wide)
    if isinstance(merged, PeftModel):
        merged = merged.merge_and_unload(safe_merge=True)
    merged = merged.to(written)
    merged.generation_config = generation
    return unnested(merged)


def _refuse_biases(model: PreTrainedModel | PeftModel) -> None:
    """Raise ValueError where an adapter trains biases, and the base model has none there."""
    if not isinstance(model, PeftModel) or not model.peft_config["default"].lora_bias:
        return
    bases = [one.get_base_layer() for one in model.modules() if isinstance(one, LoraLayer)]
    if any(getattr(base, "bias", None) is None for base in bases):
        raise ValueError(
            "the adapter has biases (lora_bias), and layers of the base model have none to merge "
            "them into: export it with --to adapter"
        )


def write_merged(merged: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write merged weights, the tokenizer with its template, and the generation config."""
    merged.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)


def write_adapter(
    folder: Path, base: str, out: Path, tokenizer: PreTrainedTokenizerBase, model: PeftModel
) -> None:
    """Write a copy of the run's adapter that peft and vLLM load from any folder.

    A base model in a local folder is named by its full path.
    """
    adapter = folder / "adapter"
    config = read_object(adapter / _CONFIG)
    config["base_model_name_or_path"] = full_name(base)
    shutil.copyfile(adapter / _WEIGHTS, out / _WEIGHTS)
    write_json(out / _CONFIG, config)
    tokenizer.save_pretrained(out)
    ends = end_ids(model, tokenizer)
    inner = inner_model(model).generation_config
    generation_config(inner, tokenizer, ends).save_pretrained(out)


def adapted_base(adapter: Path, dtype: torch.dtype, trust_remote_code: bool) -> PeftModel:
    """Load an adapter with its base model by transformers and peft alone, as its users do."""
    base, trust = read_object(adapter / _CONFIG)["base_model_name_or_path"], trust_remote_code
    if model_class(read_config(base, None, trust)) is not None or trust:
        return AutoPeftModelForCausalLM.from_pretrained(
            adapter, dtype=dtype, trust_remote_code=trust
        )
    whole = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(whole, adapter)


def full_name(base: str) -> str:
    """Returns a base model's name: of one in a local folder, its full path."""
    return str(Path(base).resolve()) if Path(base).is_dir() else base


def end_ids(model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the token ids that end an answer under the tokenizer's template."""
    return turn_of(model, tokenizer).end_tokens


def generation_config(
    own: GenerationConfig, tokenizer: PreTrainedTokenizerBase, ends: list[int]
) -> GenerationConfig:
    """Returns the base model's generation config with the end tokens of the template."""
    changed = {"eos_token_id": ends, "pad_token_id": pad_id(tokenizer)}
    return GenerationConfig.from_dict(own.to_diff_dict() | changed)


def refuse_for_vllm(adapter: Path) -> int:
    """Returns the rank that vLLM must be started with for this adapter.

    Raises ValueError for an adapter that vLLM does not take.
    """
    config = read_object(adapter / _CONFIG)
    reasons = {
        "use_dora": "it is DoRA",
        "modules_to_save": "it holds whole modules (lora_modules_to_save)",
        "trainable_token_indices": "it holds token embeddings",
        "target_parameters": "it adapts parameters of experts (target_parameters)",
        "layer_replication": "it replicates layers",
        "alora_invocation_tokens": "it is an activated LoRA",
        "lora_bias": "it has biases (lora_bias)",
        "use_qalora": "it is QALoRA",
    }
    found = [why for name, why in reasons.items() if config.get(name)]
    found += ["it has biases (bias)"] * (config.get("bias", "none") != "none")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
        found.append(f"its start changed the base model's weights (init_lora_weights {start})")
    ranks = [config.get("r", LoraConfig.r), *(config.get("rank_pattern") or {}).values()]
    served = served_rank(max(ranks))
    if served is None:
        found.append(f"its rank is {max(ranks)}, and vLLM takes up to {VLLM_RANKS[-1]}")
    if found or served is None:
        raise ValueError(
            f"vLLM does not serve the adapter in {adapter}: {'; '.join(found)}. Export it with "
            "--to merged and serve that"
        )
    return served


def adapted_layers(adapter: Path) -> list[str]:
    """Returns the last names of the layers that an adapter changes, such as q_proj."""
    with safe_open(adapter / _WEIGHTS, framework="pt") as file:
        names = [name.partition(".lora_") for name in file.keys()]  # noqa: SIM118
    return sorted({layer.rpartition(".")[2] for layer, lora, _ in names if lora})


def stored_dtype(out: Path) -> str:
    """Returns the dtype of most weights in a folder of safetensors, as torch names it."""
    counts: dict[torch.dtype, int] = {}
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open has no iterator)
                one = file.get_slice(name)
                counts[one.get_dtype()] = counts.get(one.get_dtype(), 0) + 1
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return names[max(counts, key=lambda dtype: counts[dtype])]


def facts_of_sizes(out: Path) -> dict[str, Any]:
    """Returns the names and bytes of the files of an export."""
    return {path.name: path.stat().st_size for path in sorted(out.iterdir()) if path.is_file()}
