"""Which settings decided a run's figures? The facts that must be equal for a fair comparison.

What really ran counts before what was asked for. Whatever is not named here as bookkeeping is
compared: a field that a later version adds to run.json makes runs differ until somebody says that
it does not matter.
"""

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any, NamedTuple

from sftlab.config.lora_variants import SCALE_FIELDS, lora_scale
from sftlab.schema import COUNT, TEXT, check

# Recipe fields that change no figure of a report: where it is written, logged, saved and uploaded.
BOOKKEEPING = (
    "output_dir run_name overwrite extend project report_to trackio_* logging_strategy "
    "logging_steps logging_first_step log_* include_num_input_tokens_seen disable_tqdm save_* "
    "enable_jit_checkpoint push_to_hub hub_* resume_from_checkpoint ddp_timeout dataset_num_proc "
    "skip_memory_metrics measure_memory answers_during_training"
)
# Recipe fields that `_asked` and `ran` have under another name: lora_alpha, say, as lora_scale.
TRANSLATED = (
    f"bf16 fp16 bf16_full_eval fp16_full_eval use_cpu lora_alpha {' '.join(SCALE_FIELDS)} "
    "load_in_4bit load_in_8bit per_device_train_batch_size gradient_accumulation_steps "
    "global_batch_size"
)
# Recipe fields that a library chooses where they are unset.
CHOSEN = (
    "tf32",
    "attn_implementation",
    "packing",
    "compile_layers",
    "fused_lora",
    "fused_loss",
    "fsdp_layers_per_unit",
    "captured_step",
)
# Fingerprints of the rows, by split.
DATA_FACTS = ("data.train", "data.validation", "data.test")


class Settings(NamedTuple):
    """What decided a run's figures.

    `facts` are compared; an unknown fact is absent. `recipe` is what was asked for.
    """

    facts: dict[str, Any]
    recipe: dict[str, Any]

    def value(self, axis: str) -> Any:
        """Returns the run's value on an axis: what ran, else what the recipe says."""
        return self.facts.get(axis, self.recipe.get(axis))


_NEEDED = {
    "launch.strategy": TEXT,
    "launch.precision": TEXT.or_null(),
    "launch.world_size": COUNT,
}


def settings(
    run: Mapping[str, Any],
    quality: Mapping[str, Any] | None = None,
    judged: Sequence[Mapping[str, Any]] = (),
) -> Settings:
    """Returns the settings of a run from the contents of its run.json.

    Where its scores are compared too, `quality` is eval/quality.json and `judged` are the entries
    of eval/alpaca.json and eval/mt_bench.json. Raises ValueError where run.json lacks its launch.
    """
    check(run, "run.json", _NEEDED)
    ran = run.get("ran") or {}
    facts = _recipe_facts(run["recipe"]) | _asked(run) | ran
    if not ran:  # a library would have chosen what is unset, and nobody knows what
        facts = {k: v for k, v in facts.items() if v is not None or k not in CHOSEN}
    if ran.get("precision") == "fp8":  # the head was never in float8 before this was noted
        facts.setdefault("float8_head", False)
    if facts.get("lora_target_modules"):
        facts["lora_target_modules"] = sorted(facts["lora_target_modules"])
    facts |= _launch_facts(run["launch"])
    facts |= _data_facts(run)
    facts |= {f"versions.{name}": value for name, value in run.get("versions", {}).items()}
    facts |= _hardware_facts(run.get("hardware", {}), on_cpu=facts["device"] == "cpu")
    facts |= {f"quality.{name}": value for name, value in _quality_facts(quality or {}).items()}
    facts |= {f"quality.{name}": value for name, value in _judge_facts(judged).items()}
    return Settings(facts, run["recipe"])


def _recipe_facts(recipe: Mapping[str, Any]) -> dict[str, Any]:
    left_out = f"{BOOKKEEPING} {TRANSLATED}"
    return {name: value for name, value in recipe.items() if not matches(name, left_out)}


def _asked(run: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what recipe and launch config asked for, under the names of what ran.

    Nothing else is known of a run that failed.
    """
    recipe, launch, gpu = run["recipe"], run["launch"], run.get("hardware", {}).get("gpu")
    strategy = launch["strategy"]
    flag = next((name for name in ("bf16", "fp16") if recipe.get(name)), "fp32")
    version = launch.get("settings", {}).get("FSDP_VERSION", "1")
    bits = next((bits for bits in ("4bit", "8bit") if recipe.get(f"load_in_{bits}")), None)
    return {
        "precision": launch["precision"] or flag,
        "strategy": f"fsdp{version}" if strategy == "fsdp" else strategy,
        "world_size": launch["world_size"],
        "local_world_size": launch.get("local_world_size"),
        "device": "cuda" if gpu and not launch.get("hides_gpus") else "cpu",
        "quantization": bits,
        "lora_scale": [lora_scale(recipe)],
        "micro_batch": recipe.get("per_device_train_batch_size"),
        "accumulation": recipe.get("gradient_accumulation_steps"),
        "global_batch": recipe.get("global_batch_size"),
    }


def _launch_facts(launch: Mapping[str, Any]) -> dict[str, Any]:
    variables = launch.get("settings", {})
    return {
        f"launch.{name}": value
        for name, value in variables.items()
        if not _is_redundant(name, variables)
    }


def _is_redundant(name: str, variables: Mapping[str, str]) -> bool:
    """Returns whether a launch variable repeats another fact, or sets what is switched off."""
    if "DYNAMO" in name:
        return variables.get("ACCELERATE_DYNAMO_BACKEND", "NO") == "NO"
    return name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_CPU")


def _data_facts(run: Mapping[str, Any]) -> dict[str, Any]:
    data = run.get("data") or {}
    known = {
        name: (data.get(name.removeprefix("data.")) or {}).get("fingerprint") for name in DATA_FACTS
    }
    known["tokens"] = (data.get("tokenized") or {}).get("tokens")
    known["template"] = (run.get("template") or {}).get("hash")
    return {name: value for name, value in known.items() if value is not None}


def _hardware_facts(hardware: Mapping[str, Any], on_cpu: bool) -> dict[str, Any]:
    # world_size says how many GPUs worked; how many could be seen does not matter
    found = {name: value for name, value in hardware.items() if name != "gpus_visible"}
    if not on_cpu:  # beside GPUs the number of cores comes with the machine; alone they do the work
        found["host_cores"] = found.pop("cpu_cores", None)
    return {f"hardware.{name}": value for name, value in found.items()}


def _quality_facts(quality: Mapping[str, Any]) -> dict[str, Any]:
    if not quality:
        return {}
    generation = quality["generation"]
    # batches and seed decide answers only where tokens are sampled; who was asked how never does
    idle = {"file", "processes", "server"}
    idle |= set() if generation["temperature"] > 0 else {"batch_size", "seed", "decoding"}
    found = {name: quality[name] for name in ("rows", "bleu", "rouge")}
    found |= {name: value for name, value in generation.items() if name not in idle}
    found |= {f"versions.{name}": value for name, value in quality["versions"].items()}
    return found | {
        "fingerprint": quality["held_out"]["fingerprint"],
        "hardware": quality["hardware"].get("gpu"),
    }


def _judge_facts(judged: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = {}
    for one in judged:
        facts = one["judge"] | one["generation"] | {"questions": one["questions_hash"]}
        found |= {f"{one['title']}.{name}": v for name, v in facts.items() if name != "server"}
    return found


def matches(name: str, patterns: str) -> bool:
    """Returns whether a field's name fits one of the patterns, separated by blanks."""
    return any(fnmatch(name, pattern) for pattern in patterns.split())


def canonical(value: Any) -> str:
    """Returns a value as JSON, the same for equal values."""
    return json.dumps(value, sort_keys=True, default=str)
