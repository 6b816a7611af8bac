"""Write docs/models.md: what works for which family of models, found on a tiny model of each.

python docs/make_models.py

tests/test_families.py compares the page with the code, and every `yes` with transformers itself.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from sftlab.config.launch import Launch, exported, launched
from sftlab.config.parser import parse_recipe
from sftlab.config.recipe import Recipe
from sftlab.fastpath import fused_loss, varlen_attention
from sftlab.fastpath.experts import stacked_experts
from sftlab.fastpath.experts_lora import take_experts_lora
from sftlab.fastpath.float8 import freeze_in_float8
from sftlab.fastpath.selection import choose
from sftlab.fastpath.varlen_attention import why_not_the_model
from sftlab.measurement.committed_speeds import Speed, committed_speeds
from sftlab.models.adapter_names import check_adapter_names
from sftlab.models.families import FAMILIES, SMALL
from sftlab.models.layers import describe
from sftlab.models.loading import model_class
from sftlab.models.lora_config import lora_config
from sftlab.models.own_logits import logit_changes
from sftlab.models.text_part import has_causal_model
from sftlab.paths import ROOT
from sftlab.planning.measured_layers import Rows, why_several_graphs
from sftlab.planning.recipe_step import step_of
from sftlab.planning.row_lengths import RowLengths
from sftlab.planning.step import Step

PAGE = Path(__file__).parent / "models.md"
LONGEST = 512
# what LoRA is planned on, the first that a family trains
ADAPTED = (
    ("all-linear",),
    ("all-linear", "--exclude_modules", "out_proj"),
    ("all-linear", "--exclude_modules", "router"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"),
    ("in_proj", "x_proj"),
)
ROWS = RowLengths(None, 48, 8, 64, "")
HEAD = """\
# Which models train, and how fast?

```
python docs/make_models.py
```

That command writes this page. It asks the code about a tiny random model of each family. Rows have
at most 512 tokens. A test compares what packs and what has the fused loss with transformers.

Where a part is not there, the run is slower or larger, never another training.

| column | yes means |
| --- | --- |
| trains | LoRA on text trains, on all linears or on some |
| all linears | LoRA on all linear layers trains, each with a gradient; no: leave some out |
| packs | rows are laid end to end; the kernels have the family's attention |
| fused loss | whole logits never exist |
| compiled | a decoder layer is compiled in one graph; no: in several, with other code between |
| 4 bits, fp8 | no weights of experts would silently stay in 16 bits |
| experts | LoRA on the weights of experts makes no copy of them; empty where there are none |
| planned | `recipes/plan.py` makes a plan |
| measured | the most real tokens/s on one GPU in bf16, where a shape of the family was measured |
"""
COLUMNS = (
    *("trains", "all linears", "packs", "fused loss", "compiled", "4 bits", "fp8", "experts"),
    *("planned", "measured"),
)
# Which family has a shape whose name begins so? The longest beginning counts.
SHAPES = {
    "llama": "Llama 2, 3; SmolLM2",
    "qwen3-": "Qwen 3",
    "qwen3-30b-a3b": "Qwen 3 MoE",
    "qwen3-next": "Qwen3-Next",
    "qwen3.5-": "Qwen 3.5 (text)",
    "qwen3.5-moe": "Qwen 3.5 MoE (text)",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 (text)",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "phi3": "Phi-3, Phi-4",
    "phi4": "Phi-3, Phi-4",
    "gpt-oss": "gpt-oss",
}


class Row(NamedTuple):
    """Why each part does not work for a family; None where it does, '' where it has no such part.

    `measured` is a link or ''.
    """

    trains: str | None
    all_linears: str | None
    packs: str | None
    fused_loss: str | None
    compiled: str | None
    four_bits: str | None
    fp8: str | None
    experts: str | None
    planned: str | None
    measured: str


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
    all_linears = _no_training(config, family, ADAPTED[:1])
    no_packing = why_not_the_model(layers, LONGEST)
    return Row(
        all_linears and _no_training(config, family, ADAPTED),
        all_linears,
        no_packing,
        fused,
        _several_graphs(config, no_packing is None),
        _refusal(config, "single", "--load_in_4bit=true"),
        _refusal(config, "fp8") or _nothing_rounded(model),
        _copied_experts(family),
        _no_plan(config),
        measured_of(family, committed_speeds(ROOT / "results")),
    )


def measured_of(family: str, speeds: dict[str, Speed]) -> str:
    """Returns a link to the fastest speed that was measured of a family, '' where none was.

    Raises ValueError for a shape of no family.
    """
    of_family = []
    for shape, speed in speeds.items():
        begins = [name for name in SHAPES if shape.startswith(name)]
        if not begins:
            raise ValueError(f"{speed.table} has the shape {shape}, which is of no family")
        if SHAPES[max(begins, key=len)] == family:
            of_family.append((speed, shape))
    if not of_family:
        return ""
    (speed, table), shape = max(of_family)
    return f"[{shape}: {speed:,.0f}](../{table.relative_to(ROOT).as_posix()})"


def page(rows: dict[str, Row]) -> str:
    """Returns the page as Markdown."""
    lines = [f"| family | {' | '.join(COLUMNS)} |", "| --- " * (1 + len(COLUMNS)) + "|"]
    for family, found in rows.items():
        cells = ["" if why == "" else "no" if why else "yes" for why in found[:-1]]
        lines.append(f"| {family} | {' | '.join(cells)} | {found.measured} |".replace("  ", " "))
    reasons = ["| family | part | what the run or the plan says |", "| --- | --- | --- |"]
    for family, found in rows.items():
        pairs = zip(COLUMNS[:-1], found[:-1], strict=True)
        reasons += [f"| {family} | {part} | {why} |" for part, why in pairs if why]
    return "\n".join([HEAD, *lines, "\n## Why not?\n", *reasons, "", TAIL])


@cache
def _asked(launch_config: str, *options: str) -> tuple[Recipe, Launch]:
    """Returns the demo's recipe with more options, and a launch in bf16 or fp8 on one GPU."""
    path = ROOT / "recipes" / "demo" / "attn_r16.yaml"
    with launched(exported(ROOT / "accelerate_configs" / f"{launch_config}.yaml")) as launch:
        asked = ["--config", str(path), "--dtype=bfloat16", *options]
        return parse_recipe(asked, launch), launch


def _no_training(
    config: PreTrainedConfig, family: str, adapted: Sequence[Sequence[str]]
) -> str | None:
    """Returns why LoRA trains on none of the ways that it is asked for; None where one trains."""
    refused = []
    for words in adapted:
        recipe, launch = _asked("single", "--lora_target_modules", *words)
        try:
            check_adapter_names(recipe.model, config, launch, trust_remote_code=False)
        except ValueError as error:
            refused.append(str(error))
            continue
        model = get_peft_model(model_of(family), lora_config(recipe.model)).train()
        ids = torch.arange(3, 35).reshape(2, 16)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if "lora_B" in n}
        without = [
            name
            for name, gradient in gradients.items()
            if gradient is None or not 0 < float(gradient.norm()) < float("inf")
        ]
        if gradients and not without:
            return None
        refused.append(f"{', '.join(without)} get no gradient")
    return refused[0]


def _several_graphs(config: PreTrainedConfig, packs: bool) -> str | None:
    varlen_attention.register(LONGEST)
    attention = {"attn_implementation": varlen_attention.NAME} if packs else {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **attention)
    return why_several_graphs(model.requires_grad_(False), Rows(16, 16, packs))


def _refusal(config: PreTrainedConfig, launch_config: str, *options: str) -> str | None:
    recipe, launch = _asked(launch_config, *options)
    try:
        choose(recipe, config, launch, lambda: None)
    except ValueError as error:
        return str(error)
    return None


def _nothing_rounded(model: PreTrainedModel) -> str | None:
    try:
        freeze_in_float8(model)
    except ValueError as error:
        return str(error)
    return None


def _copied_experts(family: str) -> str | None:
    """Returns why LoRA on a family's experts makes a copy of them; '' where there are none."""
    model = model_of(family)
    names = stacked_names(model)
    if not names:
        return ""
    adapted = LoraConfig(target_modules=[], target_parameters=names)
    return take_experts_lora(get_peft_model(model, adapted))[1]


def stacked_names(model: PreTrainedModel) -> list[str]:
    """Returns the names of the stacked weights of experts, as `lora_target_parameters` has them."""
    experts = {id(one) for one in stacked_experts(model)}
    named = (name for name, one in model.named_parameters() if id(one) in experts)
    return sorted({".".join(name.split(".")[-3:]) for name in named})


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
        recipe, launch = _asked("single", "--lora_target_modules", *adapted, *more)
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
## What is refused?

- Quantised checkpoints (fp8, AWQ, GPTQ and others): give the one in 16 bits, with `load_in_4bit`
  where memory is short. gpt-oss is published in MXFP4; 16 bits hold it exactly, so it is loaded.
- Encoders (BERT, ModernBERT) and encoder-decoders (T5, BART, Whisper): they do not write text from
  left to right.

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

Where transformers itself reads the text out of the checkpoint (Qwen 3.5, Llama 4, Llama 3.2
Vision), its class is used. A checkpoint whose text model is built otherwise (SmolVLM, Idefics 3)
is refused in one sentence.
"""


if __name__ == "__main__":
    main()
