"""Whether runs may stand side by side: what their records differ in, and which of it an axis
explains.

What really ran beats what was asked for. Whatever is not named here as bookkeeping is compared: a
field that a later version adds to run.json makes runs differ until somebody says that it does not
matter.
"""

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from itertools import combinations
from typing import Any, NamedTuple

from sftlab.config.launch import COMPUTE_DTYPE
from sftlab.tables import preview

LAUNCH_AXES = ("precision", "strategy", "world_size", "seed")
# Recipe fields that change no figure of a report: where it is written, logged, saved and uploaded.
BOOKKEEPING = (
    "output_dir run_name overwrite project report_to trackio_* logging_strategy logging_steps "
    "logging_first_step "
    "log_* include_num_input_tokens_seen disable_tqdm save_* enable_jit_checkpoint push_to_hub "
    "hub_* "
    "resume_from_checkpoint ddp_timeout dataset_num_proc skip_memory_metrics measure_memory"
)
# Recipe fields that _asked and `ran` have under another name: lora_alpha, say, as lora_scale.
_TRANSLATED = (
    "bf16 fp16 bf16_full_eval fp16_full_eval use_cpu lora_alpha use_rslora load_in_4bit "
    "load_in_8bit "
    "per_device_train_batch_size gradient_accumulation_steps global_batch_size"
)
_CHOSEN = ("tf32", "attn_implementation", "packing", "compile_layers", "fused_loss")
_DATA = ["data.train", "data.validation", "data.test"]
# Recipe fields that do not matter where these facts are known of every run and equal.
_SETTLED_BY = {
    "chat_template_path": ["template"],
    **dict.fromkeys(
        ("dataset_name", "dataset_config", "dataset_train_split", "dataset_shape"), _DATA
    ),
    **dict.fromkeys(("dataset_fraction", "split_fractions", "streaming_eval_rows"), _DATA),
}
_BATCH = "micro_batch accumulation"
_QUANTIZED = "quantization compute *_dtypes gradients_reduced_in bnb_4bit_* use_bnb_nested_quant"
_TURNS = "template tokens quality.end_tokens quality.stop_strings"
# What follows from an axis, beside the field of its name. global_batch and lora_scale follow from
# nothing but the fields that set them: rank under a fixed alpha, or processes under a fixed
# micro-batch, are two changes in one.
FOLLOWS = {
    "precision": "dtype compute tf32 *_dtypes gradients_reduced_in launch.*FP8*",
    "strategy": "gradients_reduced_in trainable_dtypes launch.FSDP_*",
    # of three or more processes, sftlab/config/parser.py lets DDP keep the order of its sums by
    # looking for unused parameters
    "world_size": f"local_world_size {_BATCH} gradients_reduced_in hardware.host_cores ddp_find_unused_parameters",
    **dict.fromkeys(
        ("lora_r", "lora_target_modules", "lora_target_parameters"), "trainable_parameters"
    ),
    **dict.fromkeys(
        ("lora_modules_to_save", "use_dora", "model_init_kwargs"), "trainable_parameters"
    ),
    **dict.fromkeys(("lora_alpha", "use_rslora"), "lora_scale"),
    "use_peft": "lora_* trainable_parameters *_dtypes gradients_reduced_in",
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), _QUANTIZED),
    "dtype": "frozen_dtypes",
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), _BATCH),
    "global_batch_size": f"global_batch {_BATCH}",
    "max_length": "tokens",
    "packing": "attn_implementation",
    "gradient_checkpointing": "gradient_checkpointing_kwargs activation_checkpointing",
    "torch_compile": "torch_compile_*",
    "use_liger_kernel": "liger_kernel_config",
    "lr_scheduler_type": "lr_scheduler_kwargs",
    "chat_template_path": _TURNS,
    "model_name_or_path": f"{_TURNS} model_revision trainable_parameters",
    "dataset_name": "data.* dataset_config dataset_train_split dataset_shape tokens quality.fingerprint quality.rows",
}


class Settings(NamedTuple):
    """What decided a run's figures:

    `facts` are compared (a fact that is not known is absent), `recipe` is as asked.
    """

    facts: dict[str, Any]
    recipe: dict[str, Any]

    def value(self, axis: str) -> Any:
        """The run's value on an axis: what ran, else what the recipe says."""
        return self.facts.get(axis, self.recipe.get(axis))


def settings(
    run: Mapping[str, Any],
    quality: Mapping[str, Any] | None = None,
    judged: Sequence[Mapping[str, Any]] = (),
) -> Settings:
    """From the contents of run.json and, where its scores are compared too, of eval/quality.json.

    Also from the entries of eval/alpaca.json and mt_bench.json: what was asked, how it was
    answered, who judged.
    """
    recipe, launch, ran, data = (
        run["recipe"],
        run["launch"],
        run.get("ran") or {},
        run.get("data") or {},
    )
    facts = (
        {k: v for k, v in recipe.items() if not _among(k, f"{BOOKKEEPING} {_TRANSLATED}")}
        | _asked(run)
        | ran
    )
    if not ran:
        # unset means that a library chooses; what it chose is known of the runs that ran
        facts = {k: v for k, v in facts.items() if v is not None or k not in _CHOSEN}
    if facts.get("lora_target_modules"):
        facts["lora_target_modules"] = sorted(facts["lora_target_modules"])
    variables = launch.get("settings", {})
    facts |= {
        f"launch.{name}": value
        for name, value in variables.items()
        if not _said_elsewhere(name, variables)
    }
    known = {
        name: (data.get(name.removeprefix("data.")) or {}).get("fingerprint") for name in _DATA
    }
    known["tokens"] = (data.get("tokenized") or {}).get("tokens")
    known["template"] = (run.get("template") or {}).get("hash")
    facts |= {name: value for name, value in known.items() if value is not None}
    facts |= {f"versions.{name}": value for name, value in run.get("versions", {}).items()}
    hardware = dict(run.get("hardware", {}))
    # How many GPUs could be seen is no setting: world_size says how many worked. Beside GPUs the
    # number of CPU cores comes with the machine that has so many GPUs; without them the cores do
    # the work.
    hardware.pop("gpus_visible", None)
    if facts["device"] != "cpu":
        hardware["host_cores"] = hardware.pop("cpu_cores", None)
    facts |= {f"hardware.{name}": value for name, value in hardware.items()}
    facts |= {f"quality.{name}": value for name, value in _judged(quality or {}).items()}
    for one in judged:
        found = one["judge"] | one["generation"] | {"questions": one["questions_hash"]}
        facts |= {
            f"quality.{one['title']}.{name}": value
            for name, value in found.items()
            if name != "server"
        }
    return Settings(facts, recipe)


def _asked(run: Mapping[str, Any]) -> dict[str, Any]:
    """What recipe and launch config asked for, under the names of what ran:

    all that is known of a run that failed.
    """
    recipe, launch, gpu = run["recipe"], run["launch"], run.get("hardware", {}).get("gpu")
    rank, strategy = recipe.get("lora_r") or 1, launch["strategy"]
    flag = next((name for name in ("bf16", "fp16") if recipe.get(name)), "fp32")
    version = launch.get("settings", {}).get("FSDP_VERSION", "1")
    return {
        "precision": launch["precision"] or flag,
        "strategy": f"fsdp{version}" if strategy == "fsdp" else strategy,
        "world_size": launch["world_size"],
        "local_world_size": launch.get("local_world_size"),
        "device": "cuda" if gpu and not launch.get("hides_gpus") else "cpu",
        "quantization": "4bit"
        if recipe.get("load_in_4bit")
        else "8bit"
        if recipe.get("load_in_8bit")
        else None,
        "lora_scale": [
            recipe.get("lora_alpha", 0) / (math.sqrt(rank) if recipe.get("use_rslora") else rank)
        ],
        "micro_batch": recipe.get("per_device_train_batch_size"),
        "accumulation": recipe.get("gradient_accumulation_steps"),
        "global_batch": recipe.get("global_batch_size"),
    }


def _said_elsewhere(name: str, variables: Mapping[str, str]) -> bool:
    """Whether an environment variable of the launch config repeats another fact, or sets what is
    switched off.
    """
    if "DYNAMO" in name:
        return variables.get("ACCELERATE_DYNAMO_BACKEND", "NO") == "NO"
    return name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_CPU")


def _judged(quality: Mapping[str, Any]) -> dict[str, Any]:
    if not quality:
        return {}
    generation = quality["generation"]
    # batches and seed decide answers only where tokens are drawn
    idle = {"file"} if generation["temperature"] > 0 else {"file", "batch_size", "seed"}
    found = {name: quality[name] for name in ("rows", "bleu", "rouge")}
    found |= {name: value for name, value in generation.items() if name not in idle}
    found |= {f"versions.{name}": value for name, value in quality["versions"].items()}
    return found | {
        "fingerprint": quality["held_out"]["fingerprint"],
        "hardware": quality["hardware"].get("gpu"),
    }


def differences(
    runs: Mapping[str, Settings], axes: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Fields in which runs differ and which `axes` do not explain, each with the value of every run
    that has it.

    What follows from an axis must be equal among the runs of equal axis values: precision explains
    a difference in dtype between fp32 and bf16, not between two runs in bf16. An axis in which the
    runs are equal explains nothing; only dataset_name stands for other data also where another
    field (dataset_fraction) made them.
    """
    axes = [
        axis
        for axis in axes
        if axis == "dataset_name" or len({_key(o.value(axis)) for o in runs.values()}) > 1
    ]
    groups: dict[str, list[str]] = {}
    for name, one in runs.items():
        groups.setdefault(_key([one.value(axis) for axis in axes]), []).append(name)
    free = " ".join(f"{axis} {FOLLOWS.get(axis, '')}" for axis in axes)
    found = {}
    for field in dict.fromkeys(field for one in runs.values() for field in one.facts):
        settled = [
            {_key(one.facts.get(fact)) for one in runs.values()}
            for fact in _SETTLED_BY.get(field, ())
        ]
        if settled and all(len(values) == 1 and values != {"null"} for values in settled):
            continue
        # a variable of the launch config that is not there is unset; another fact that is not there
        # is not known
        unset = field.startswith("launch.")
        values = {
            name: one.facts.get(field) for name, one in runs.items() if unset or field in one.facts
        }
        keys = {name: _key(value) for name, value in values.items()}
        if field == "strategy" and "world_size" in axes:
            # one process has no gradients to average: its strategy follows from there being one
            keys = {name: '"ddp"' if key == '"single"' else key for name, key in keys.items()}
        parts = groups.values() if _among(field, free) else [keys]
        if any(len({keys[name] for name in part if name in keys}) > 1 for part in parts):
            found[field] = values
    return found


def suggest_axes(
    runs: Mapping[str, Settings], axes: Sequence[str] = ()
) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Axes, `axes` among them, that explain as much as axes can, and what they leave unexplained.

    With none given and one that explains everything, that one is the axis. Other data are never
    suggested.
    """
    names = [
        *LAUNCH_AXES,
        *sorted({name for one in runs.values() for name in one.recipe if name != "dataset_name"}),
    ]
    names = [name for name in dict.fromkeys(names) if not _among(name, BOOKKEEPING)]
    names = [name for name in names if len({_key(one.value(name)) for one in runs.values()}) > 1]
    chosen, left = list(axes), differences(runs, axes)
    while left and names:
        best = min(names, key=lambda name: len(differences(runs, [*chosen, name])))
        rest = differences(runs, [*chosen, best])
        if len(rest) >= len(left):
            break
        chosen, left = [*chosen, best], rest
    return chosen, left


def settle_axes(
    runs: Mapping[str, Settings], asked: Sequence[str], allow: bool = False
) -> list[str]:
    """The axes: those asked for, else the one that explains all differences, where there is one.

    ValueError for a name that is no axis and, unless `allow`, for runs that differ in more than the
    axes explain.
    """
    known = {
        *LAUNCH_AXES,
        *_CHOSEN,
        *(name for one in runs.values() for name in (*one.recipe, *one.facts)),
    }
    for axis in asked:
        if axis not in known and not axis.startswith("launch."):
            near = difflib.get_close_matches(axis, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"--axis {axis}: no field of a recipe, nor one of {', '.join(LAUNCH_AXES)}{hint}"
            )
    suggested, unexplained = suggest_axes(runs, asked)
    axes = suggested if not asked and len(suggested) == 1 and not unexplained else list(asked)
    left = differences(runs, axes)
    if left and not allow:
        never = f" (no axis explains {', '.join(unexplained)})" if unexplained else ""
        hint = ""
        if "lora_scale" in left:
            hint = "\nlora_scale is lora_alpha / lora_r: train with an alpha that follows the rank."
        raise ValueError(
            "these runs differ in more than "
            f"{'the axis ' + ', '.join(axes) if axes else 'one setting'}, so that no "
            "figure can be put down to one cause:\n  "
            + "\n  ".join(describe(left))
            + hint
            + "\nName what is compared "
            f"(--axis {' '.join(suggested) or 'FIELD'}{never}), give fewer runs, or pass "
            "--allow-confounded"
        )
    return axes


def moving_together(runs: Mapping[str, Settings], axes: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of axes of which each value of one goes with one value of the other:

    their effects cannot be told apart.
    """
    values = {axis: [_key(one.value(axis)) for one in runs.values()] for axis in axes}
    return [
        (a, b)
        for a, b in combinations(axes, 2)
        if len(set(zip(values[a], values[b], strict=True)))
        == len(set(values[a]))
        == len(set(values[b]))
        > 1
    ]


def replicas(runs: Mapping[str, Settings]) -> list[list[str]]:
    """Groups of two or more runs that are equal but for their seed (and for how their scores were
    found).
    """
    groups: dict[str, list[str]] = {}
    for name, one in runs.items():
        same = {k: v for k, v in one.facts.items() if k != "seed" and not k.startswith("quality.")}
        groups.setdefault(_key(same), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def describe(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Each differing field in one line: `lora_r: 8 (a, b) | 16 (c)`."""
    lines = []
    for field, values in found.items():
        names: dict[str, list[str]] = {}
        for name, value in values.items():
            names.setdefault(short(value), []).append(name)
        some = [
            f"{v} ({', '.join(who[:3])}{f' and {len(who) - 3} more' * (len(who) > 3)})"
            for v, who in names.items()
        ]
        lines.append(f"{field}: {' | '.join(some)}")
    return lines


def short(value: Any) -> str:
    """A setting as a person reads it."""
    text = (
        " ".join(map(str, value))
        if isinstance(value, list)
        else json.dumps(value, default=str).strip('"')
    )
    return preview("none" if text in ("", "null") else text, 70)


def in_order(value: Any) -> tuple:
    """Sorting key of axis values:

    numbers by size, precisions as they get coarser, lists by length.
    """
    if isinstance(value, bool | int | float):
        return (0, value, "")
    precisions = list(COMPUTE_DTYPE)
    place = (
        precisions.index(value)
        if value in precisions
        else len(value)
        if isinstance(value, list)
        else 0
    )
    return (1, place, short(value))


def _among(name: str, patterns: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns.split())


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
