"""Write docs/models.md: what works for which family of models, found on a tiny model of each.

python docs/make_models.py

tests/test_families.py compares the page with the code, and every `yes` with transformers itself.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from peft import get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from sftlab.config.launch import Launch, exported, launched
from sftlab.config.parser import parse_recipe
from sftlab.config.recipe import Recipe
from sftlab.fastpath import fused_loss
from sftlab.fastpath.selection import choose
from sftlab.fastpath.varlen_attention import why_not_the_model
from sftlab.models.adapter_names import check_adapter_names
from sftlab.models.layers import describe
from sftlab.models.loading import model_class
from sftlab.models.lora_config import lora_config
from sftlab.models.own_logits import logit_changes
from sftlab.models.text_part import has_causal_model
from sftlab.paths import ROOT
from sftlab.planning.recipe_step import step_of
from sftlab.planning.row_lengths import RowLengths
from sftlab.planning.step import Step

PAGE = Path(__file__).parent / "models.md"
LONGEST = 512
SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
# what LoRA is planned on, the first that a family trains
ADAPTED = (
    ("all-linear",),
    ("all-linear", "--exclude_modules", "out_proj"),
    ("all-linear", "--exclude_modules", "router"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"),
)
ROWS = RowLengths(None, 48, 8, 64, "")
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97}
GRANITE = {"logits_scaling": 8.0, "attention_multiplier": 0.0625, "residual_multiplier": 0.22}
MLA = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
DELTA_NET = {
    **LINEAR,
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16},
}
MAMBA2 = {
    **{"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1},
    **{"mamba_chunk_size": 16, "mamba_d_conv": 4, "mamba_expand": 2},
}
SHARED_EXPERT = {"num_experts": 4, "shared_expert_intermediate_size": 32, **MIXTURE}
# Family, the class of its config without `Config`, and fields of a tiny model that differ.
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "Llama 2, 3; SmolLM2": ("Llama", {}),
    "Llama 4 (text)": (
        "Llama4Text",
        {
            "layer_types": ["chunked_attention", "full_attention"],
            "attention_chunk_size": 8192,
            "intermediate_size_mlp": 96,
            "num_local_experts": 2,
        },
    ),
    "Qwen 2, 2.5": ("Qwen2", {}),
    "Qwen 3": ("Qwen3", {"head_dim": 16}),
    "Qwen 2.5-VL (text)": ("Qwen2_5_VLText", {"rope_parameters": MROPE}),
    "Qwen 3-VL (text)": ("Qwen3VLText", {"head_dim": 16, "rope_parameters": MROPE}),
    "Qwen 3 MoE": ("Qwen3Moe", {"head_dim": 16, "num_local_experts": 4, **MIXTURE}),
    "Qwen3-Next": ("Qwen3Next", {"head_dim": 16, **DELTA_NET, **SHARED_EXPERT}),
    "Qwen 3.5 (text)": ("Qwen3_5Text", {"head_dim": 16, **DELTA_NET}),
    "Qwen 3.5 MoE (text)": ("Qwen3_5MoeText", {"head_dim": 16, **DELTA_NET, **SHARED_EXPERT}),
    "Gemma 2": ("Gemma2", {"head_dim": 32, **WINDOWS}),
    "Gemma 3 (text)": ("Gemma3Text", {"head_dim": 32, **WINDOWS}),
    "Gemma 4 (text)": ("Gemma4Text", {"head_dim": 32, **WINDOWS, **PER_LAYER}),
    "Mistral 7B v0.1": ("Mistral", {"sliding_window": 8}),
    "Mistral 7B v0.2 and later": ("Mistral", {"sliding_window": None}),
    "Mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Phi-2": ("Phi", {}),
    "Phi-3, Phi-4": ("Phi3", {"sliding_window": 8}),
    "OLMo 2": ("Olmo2", {}),
    "OLMo 3": ("Olmo3", dict(WINDOWS)),
    "OLMo Hybrid": ("OlmoHybrid", dict(DELTA_NET)),
    "SmolLM3": ("SmolLM3", {}),
    "Granite 3": ("Granite", dict(GRANITE)),
    "Granite MoE": ("GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Granite 4 hybrid": (
        "GraniteMoeHybrid",
        {
            **LINEAR,
            **MAMBA2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 64,
        },
    ),
    "Bamba": ("Bamba", {**MAMBA2, "attn_layer_indices": [1]}),
    "Falcon-H1": ("FalconH1", {**MAMBA2, "mamba_d_ssm": 128}),
    "Nemotron-H": (
        "NemotronH",
        {
            **MIXTURE,
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "moe", "full_attention", "mlp"],
            **{"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1},
            **{"chunk_size": 16, "head_dim": 16, "n_routed_experts": 4},
            "moe_shared_expert_intermediate_size": 64,
        },
    ),
    "Command R": ("Cohere", {"logit_scale": 0.0625}),
    "Command R7B": ("Cohere2", {"logit_scale": 0.0625, **WINDOWS}),
    "GLM-4": ("Glm4", {"head_dim": 16}),
    "Seed-OSS": ("SeedOss", {"head_dim": 16}),
    "Exaone 4": ("Exaone4", dict(WINDOWS)),
    "ERNIE 4.5": ("Ernie4_5", {}),
    "Hunyuan (dense)": ("HunYuanDenseV1", {"head_dim": 16}),
    "gpt-oss": ("GptOss", {"head_dim": 16, "num_local_experts": 4, **MIXTURE, **WINDOWS}),
    "DeepSeek V3": (
        "DeepseekV3",
        {
            **MIXTURE,
            **MLA,
            "qk_nope_head_dim": 16,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
        },
    ),
    "Kimi Linear": (
        "KimiLinear",
        {
            **{**LINEAR, **MIXTURE, **MLA, "num_key_value_heads": 4},
            **{"linear_num_heads": 2, "linear_head_dim": 16, "num_local_experts": 4},
        },
    ),
    "LFM2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "LFM2 MoE": (
        "Lfm2Moe",
        {"layer_types": ["conv", "full_attention"], "num_experts": 4, "num_dense_layers": 1}
        | MIXTURE,
    ),
    "GPT-2": ("GPT2", {"attn_pdrop": 0.1, "n_inner": 96}),
    "Pythia": ("GPTNeoX", {}),
    "RecurrentGemma": ("RecurrentGemma", {"lru_width": 64, "attention_window_size": 32}),
    "Mamba": ("Mamba", {}),
}
HEAD = """\
# Which models train, and how fast?

```
python docs/make_models.py
```

That command writes this page. It asks the code about a tiny random model of each family. Rows have
at most 512 tokens. A test compares what packs and what has the fused loss with transformers.

Every family of the table trains with LoRA on text. Where a part is not there, the run is slower or
larger, never another training. Measured speeds are in [fast_path.md](fast_path.md).

| column | yes means |
| --- | --- |
| all linears | LoRA on all linear layers trains, each with a gradient; no: leave some out |
| packs | rows are laid end to end; the kernels have the family's attention |
| fused loss | whole logits never exist |
| 4 bits | no weights of experts would silently stay in 16 bits; the same holds for fp8 |
| planned | `recipes/plan.py` makes a plan; of a mixture, with LoRA on its attention alone |
"""
COLUMNS = ("all linears", "packs", "fused loss", "4 bits", "planned")


class Row(NamedTuple):
    """Why each part does not work for a family; None where it does."""

    all_linears: str | None
    packs: str | None
    fused_loss: str | None
    rounded: str | None
    planned: str | None


def main() -> None:
    """Write the page."""
    transformers.logging.set_verbosity_error()
    PAGE.write_text(page({name: row(name) for name in FAMILIES}), encoding="utf-8")
    print(f"{PAGE.name}: {len(FAMILIES)} families")


def config_of(family: str) -> PreTrainedConfig:
    """Returns the config of a family's tiny model."""
    name, fields = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SMALL | fields)
    if not has_causal_model(config):
        raise ValueError(f"{family}: transformers has no causal language model for {name}Config")
    return config


def model_of(family: str) -> PreTrainedModel:
    """Returns a family's tiny model: frozen random weights of a size at which attention matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    return model.eval().requires_grad_(False)


def row(family: str) -> Row:
    """Returns what works for a family."""
    config, model = config_of(family), model_of(family)
    layers = describe(config, model_class(config))
    fused = fused_loss.why_not(model)
    if fused is None and isinstance(changes := logit_changes(model), str):
        fused = changes
    return Row(
        _not_all_linears(config, model_of(family)),
        why_not_the_model(layers, LONGEST),
        fused,
        _refusal(config, "--load_in_4bit=true"),
        _no_plan(config),
    )


def page(rows: dict[str, Row]) -> str:
    """Returns the page as Markdown."""
    lines = [f"| family | {' | '.join(COLUMNS)} |", "| --- " * (1 + len(COLUMNS)) + "|"]
    for family, found in rows.items():
        cells = ["no" if why else "yes" for why in found]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    reasons = ["| family | part | what the run or the plan says |", "| --- | --- | --- |"]
    for family, found in rows.items():
        pairs = zip(COLUMNS, found, strict=True)
        reasons += [f"| {family} | {part} | {why} |" for part, why in pairs if why]
    return "\n".join([HEAD, *lines, "\n## Why not?\n", *reasons, "", TAIL])


@cache
def _asked(*options: str) -> tuple[Recipe, Launch]:
    """Returns the demo's recipe with more options, and a launch in bf16 on one GPU."""
    path = ROOT / "recipes" / "demo" / "attn_r16.yaml"
    with launched(exported(ROOT / "accelerate_configs" / "single.yaml")) as launch:
        asked = ["--config", str(path), "--dtype=bfloat16", *options]
        return parse_recipe(asked, launch), launch


def _not_all_linears(config: PreTrainedConfig, model: PreTrainedModel) -> str | None:
    recipe, launch = _asked("--lora_target_modules", "all-linear")
    try:
        check_adapter_names(recipe.model, config, launch, trust_remote_code=False)
    except ValueError as error:
        return str(error)
    model = get_peft_model(model, lora_config(recipe.model)).train()
    ids = torch.arange(3, 35).reshape(2, 16)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if "lora_B" in n}
    without = [
        name
        for name, gradient in gradients.items()
        if gradient is None or not 0 < float(gradient.norm()) < float("inf")
    ]
    return f"{', '.join(without)} get no gradient" if without or not gradients else None


def _refusal(config: PreTrainedConfig, option: str) -> str | None:
    recipe, launch = _asked(option)
    try:
        choose(recipe, config, launch, lambda: None)
    except ValueError as error:
        return str(error)
    return None


def _no_plan(config: PreTrainedConfig) -> str | None:
    try:
        planned(config)
    except ValueError as error:
        return str(error)
    return None


def planned(config: PreTrainedConfig, *options: str) -> tuple[Step, Recipe]:
    """Returns the planned step of a model's layers, not compiled, and its recipe.

    LoRA is on all linears, or on most where not all train. Raises ValueError where no plan is made.
    """
    refused = []
    for adapted in ADAPTED:
        more = ("--compile_layers=false", "--lora_dropout=0", *options)
        recipe, launch = _asked("--lora_target_modules", *adapted, *more)
        try:
            check_adapter_names(recipe.model, config, launch, trust_remote_code=False)
        except ValueError:
            continue
        try:
            fast = choose(recipe, config, launch, lambda: None)
            return step_of(recipe, config, launch, fast, ROWS.longest, ROWS), recipe
        except ValueError as error:
            refused.append(error)
    raise refused[0]


TAIL = """\
## What about checkpoints that take images?

Gemma 3 and 4, Qwen 2.5-VL and 3-VL, Mistral Small 3, GLM-4V, InternVL, LLaVA and others are
published as one checkpoint for images and text. Give its name as `model_name_or_path`. Its text
model trains, and the run says so. Images are never trained.

- Every tensor comes from the checkpoint. Before use, the text model's logits are held to those of
  the whole model; where they differ, as in Aya Vision, the model is refused.
- The adapter has the checkpoint's own names, and its config names every layer that it adapts. So it
  loads into the checkpoint with plain peft, and leaves the part for images alone.
- `recipes/export.py --to merged` writes the text model alone where transformers has a class for it
  (Gemma 3 and 4, Mistral 3). For the others export the adapter.

Where transformers itself reads the text out of the checkpoint (Qwen 3.5, Llama 4), its class is
used. A checkpoint whose text model is built otherwise (Llama 3.2 Vision, SmolVLM) is refused in one
sentence.
"""


if __name__ == "__main__":
    main()
