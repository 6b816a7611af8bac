"""The model card of an export: what run.json and quality.json know, and how to use it."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from sftlab.config.lora_start import DEFAULT, begin_words, saved_rank
from sftlab.config.lora_variants import variant_words
from sftlab.evaluation.text_metrics import NAMES
from sftlab.export.formats import refuse_for_vllm
from sftlab.export.usage import Export, usage, usage_in_run
from sftlab.schema import COUNT, NUMBER, OBJECT, TEXT, TEXT_OR_TEXTS, check
from sftlab.tables import figure, interval, markdown, p_value

_LIBRARY = {"merged": "transformers", "adapter": "peft", "gguf": "gguf"}
_SHOWN = {
    **dict.fromkeys(("ran", "measured", "versions", "hardware", "data", "template"), OBJECT),
    **{f"data.{split}.rows": COUNT.or_null() for split in ("train", "validation", "test")},
    "data.train.fingerprint": TEXT,
    **dict.fromkeys(("template.source", "template.hash"), TEXT),
    "recipe.dtype": TEXT,
    "recipe.model_revision": TEXT.or_null(),
    "recipe.max_length": COUNT.or_null(),
    "recipe.learning_rate": NUMBER,
    **dict.fromkeys(("ran.global_batch", "ran.world_size", "ran.trainable_parameters"), COUNT),
    **dict.fromkeys(("ran.precision", "ran.strategy"), TEXT),
    "measured.global_step": COUNT,
}
_SHOWN_OF_LORA = {
    **dict.fromkeys(("recipe.lora_r", "recipe.lora_alpha"), NUMBER),
    "recipe.lora_target_modules": TEXT_OR_TEXTS,
}
_FROM_BESIDE = "From the folder in which `{name}` is:"


def adapter_card(run: dict[str, Any], adapter: Path, ends: list[int]) -> ModelCard:
    """Returns the card of a run's own adapter, which says what run.json knows.

    `ends` are the token ids that end an answer. The hub is not asked for the base model's licence:
    a node that trains may not reach it.
    """
    recipe = run["recipe"]
    rank = None
    if recipe["use_peft"]:
        with suppress(ValueError):  # vLLM does not take it
            rank = refuse_for_vllm(adapter)
    kind = "adapter" if recipe["use_peft"] else "merged"
    base, dtype = recipe["model_name_or_path"], recipe["dtype"]
    within = (run["ran"] or {}).get("text_of")
    own = Export(str(adapter), kind, dtype, ends, base, rank=rank, text_of=within)
    return _card(run, None, own, usage_in_run(own, str(adapter.parent)), ask_hub=False)


def model_card(run: dict[str, Any], quality: dict[str, Any], export: Export) -> ModelCard:
    """Returns the card of an export.

    `quality` is quality.json, {} where the run was not evaluated.
    """
    return _card(run, quality, export, usage(export), ask_hub=True)


def _card(
    run: dict[str, Any],
    quality: dict[str, Any] | None,
    export: Export,
    used: list[str],
    ask_hub: bool,
) -> ModelCard:
    recipe = run["recipe"]
    base = recipe["model_name_or_path"]
    local = Path(base).is_dir()
    data = ModelCardData(
        library_name=_LIBRARY[export.kind],
        pipeline_tag="text-generation",
        tags=[*(["lora"] if recipe["use_peft"] else []), recipe.get("method", "sft"), "trl"],
        base_model=None if local else base,
        datasets=_hub_data(recipe),
        license=license_of(base) if ask_hub or local else None,
    )
    origin = f"the local base model `{base}`" if local else f"[{base}]({_link(base)})"
    tuned = "fine-tuned with LoRA" if recipe["use_peft"] else "fully fine-tuned"
    where = [] if export.hub or quality is None else [_FROM_BESIDE.format(name=export.name)]
    parts = [
        f"# {export.name}",
        f"{_what(export.kind)} of {origin}, {tuned}.",
        *_own_folder(quality, base, local),
        "## How to use it",
        *where,
        *used,
        "## How it was trained",
        *markdown([["what", "value"], *_training(run)]),
        "## What really ran",
        *markdown([["what", "value"], *_ran(run)]),
    ]
    if data.license is None:
        parts.append("The base model's licence is not known here: it holds for this model too.")
    text = "\n\n".join(
        "\n".join(part) if isinstance(part, list) else part for part in _blocks(parts)
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def license_of(base: str) -> str | None:
    """Returns the licence that the base model's card names, or None."""
    try:
        card = ModelCard.load(Path(base) / "README.md" if Path(base).is_dir() else base)
    except (OSError, ValueError, HfHubHTTPError, OfflineModeIsEnabled):
        return None
    return card.data.license


def _blocks(parts: list[str]) -> list[Any]:
    """Returns the parts with the lines of each table together."""
    found: list[Any] = []
    for part in parts:
        if part.startswith("|") and found and isinstance(found[-1], list):
            found[-1].append(part)
        else:
            found.append([part] if part.startswith("|") else part)
    return found


def _what(kind: str) -> str:
    return {
        "merged": "Weights",
        "adapter": "A LoRA adapter",
        "gguf": "A GGUF file",
    }[kind]


def _link(base: str) -> str:
    return f"https://huggingface.co/{base}"


def _hub_data(recipe: dict[str, Any]) -> list[str] | None:
    names = recipe["dataset_name"]
    names = names if isinstance(names, list) else [names]
    found = [one for one in names if isinstance(one, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", one)]
    return [one for one in found if not Path(one).exists()] or None


def _own_folder(quality: dict[str, Any] | None, base: str, local: bool) -> list[str]:
    """Returns the scores, or of a run's own adapter where they are and where it loads."""
    if quality is not None:
        return _scores(quality)
    lines = ["Scores are in the folder `eval` beside this one, once the run is evaluated."]
    if local and not Path(base).is_absolute():
        lines.append(
            f"The path `{base}` is looked for in the folder that you are in. `python "
            "recipes/export.py --to adapter` writes an adapter that loads from any folder."
        )
    return lines


def _scores(quality: dict[str, Any]) -> list[str]:
    if not quality:
        return ["It was not evaluated."]
    lines = [["score", "base", "tuned", "tuned - base", "p"]]
    for name, title in NAMES.items():
        one = quality["scores"].get(name)
        if one:
            lines.append(
                [
                    title,
                    interval(one["base"]),
                    interval(one["tuned"]),
                    interval(one["difference"]),
                    p_value(one["p_holm"]),
                ]
            )
    about = f"{quality['rows']:,} held-out rows of {quality['held_out']['dataset']}"
    return [
        "## Scores",
        f"Base against tuned on {about}. In brackets are 95 % intervals; p is after Holm.",
        *markdown(lines),
    ]


def check_run(run: dict[str, Any], where: str) -> None:
    """Raise ValueError where run.json lacks what a card shows of a run."""
    check(run, where, _SHOWN | (_SHOWN_OF_LORA if run["recipe"]["use_peft"] else {}))


def _training(run: dict[str, Any]) -> list[list[str]]:
    recipe, data = run["recipe"], run["data"]
    rows = {part: data[part]["rows"] for part in ("train", "validation", "test")}
    counts = ", ".join(f"{part} {count:,}" for part, count in rows.items() if count is not None)
    return [
        ["data", f"{recipe['dataset_name']}, fingerprint {data['train']['fingerprint']}"],
        ["rows", counts],
        ["chat template", f"{run['template']['source']}, hash {run['template']['hash']}"],
        *([_lora(recipe)] if recipe["use_peft"] else []),
        ["learning rate", str(recipe["learning_rate"])],
        ["global batch", f"{run['ran']['global_batch']} rows"],
        ["steps", f"{run['measured']['global_step']:,}"],
        ["versions", ", ".join(f"{k} {v}" for k, v in run["versions"].items())],
    ]


def _lora(recipe: dict[str, Any]) -> list[str]:
    targets = recipe["lora_target_modules"]
    named = ", ".join(targets) if isinstance(targets, list) else str(targets)
    rank, init = recipe["lora_r"], str(recipe.get("init_lora_weights", DEFAULT)).lower()
    told = [f"rank {rank}, alpha {recipe['lora_alpha']}, {named}", *variant_words(recipe)]
    if init != DEFAULT:
        saved = saved_rank(init, rank)
        more = "" if saved == rank else f" (the saved adapter has rank {saved})"
        told.append(f"began with {begin_words(init)}{more}")
    if ratio := recipe.get("loraplus_lr_ratio"):
        told.append(f"LoRA+ (the B matrices have {ratio} times the learning rate)")
    return ["LoRA", "; ".join(told)]


def _ran(run: dict[str, Any]) -> list[list[str]]:
    ran, measured = run["ran"], run["measured"]
    loss = measured.get("validation_loss")
    lines = [
        ["precision", str(ran["precision"])],
        ["strategy", f"{ran['strategy']}, world size {ran['world_size']}"],
        ["trainable parameters", f"{ran['trainable_parameters']:,}"],
        ["hardware", str(run["hardware"].get("gpu") or "CPU")],
        ["real tokens/s", figure(measured["tokens_per_s"]) if measured.get("tokens_per_s") else ""],
        ["validation loss (nats a token)", figure(loss) if loss is not None else ""],
    ]
    quantised = ran.get("quantization")
    if quantised:
        lines.insert(1, ["quantized in training", json.dumps(quantised)])
    return [line for line in lines if line[1]]
