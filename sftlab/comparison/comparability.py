"""May these runs stand side by side? Say what they differ in, and which of it an axis explains.

sftlab/comparison/run_settings.py says what is compared.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from sftlab.comparison.run_settings import (
    BOOKKEEPING,
    CHOSEN,
    DATA_FACTS,
    Settings,
    canonical,
    matches,
)
from sftlab.config.launch import COMPUTE_DTYPE
from sftlab.config.lora_variants import PARAMETER_FIELDS, SCALE_FIELDS
from sftlab.tables import preview

Differences = dict[str, dict[str, Any]]

LAUNCH_AXES = ("precision", "strategy", "world_size", "seed")
# Recipe fields that do not matter where these facts are known of every run and equal.
_COVERED_BY = {
    "chat_template_path": ("template",),
    **dict.fromkeys(
        (
            *("dataset_name", "dataset_config", "dataset_train_split", "dataset_shape", "datasets"),
            *("datasets_stopping_strategy", "columns", "dataset_text_from_numbers"),
            *("validation_file", "test_file", "dataset_validation_split", "dataset_test_split"),
            *("dataset_fraction", "split_fractions", "streaming_eval_rows", "loss_on"),
        ),
        DATA_FACTS,
    ),
}
_BATCH = "micro_batch accumulation"
_QUANTIZED = (
    "quantization compute *_dtypes gradients_reduced_in bnb_4bit_* use_bnb_nested_quant "
    "four_bit_weights fsdp_layers_per_unit fused_lora"
)
# what runs choose from the sizes of batches, rows and layers; the training is the same
_FROM_SIZES = ("captured_step", "attention_tile", "kernels_with_lora")
# what a stage of training has of its own: its data, its loss, its steps
_STAGE = (
    "adapter_name_or_path data.* dataset_* datasets* columns tokens *_file loss_on "
    "learning_rate lr_* warmup_* max_steps num_train_epochs max_length truncation_mode "
    f"global_batch {_BATCH} loss_type beta reference lora_dropout neftune_noise_alpha "
    "packing compile_layers fused_lora fused_loss float8_head captured_step attn_implementation "
    # a copy of the adapter is frozen beside it
    "completion_only_loss frozen_dtypes eval_strategy eval_steps save_strategy save_steps "
    "quality.fingerprint quality.rows"
)
_TURNS = "template tokens quality.end_tokens quality.stop_strings"
# Fields that change with an axis, beside the field of its name. global_batch and lora_scale follow
# only from the fields that set them: rank under a fixed alpha, or processes under a fixed
# micro-batch, are two changes in one.
FOLLOWS = {
    "method": _STAGE,
    "precision": "dtype compute tf32 *_dtypes gradients_reduced_in four_bit_weights "
    "fsdp_layers_per_unit float8_head fused_lora launch.*FP8*",
    "strategy": "gradients_reduced_in trainable_dtypes four_bit_weights fsdp_layers_per_unit "
    "fused_lora launch.FSDP_*",
    # sftlab/config/validation.py has DDP of three or more processes look for unused parameters
    "world_size": f"local_world_size {_BATCH} gradients_reduced_in hardware.host_cores "
    "ddp_find_unused_parameters",
    **dict.fromkeys(
        ("lora_r", "lora_target_modules", "lora_target_parameters"),
        # an adapter to go on from has the rank and the targets
        "trainable_parameters adapter_name_or_path fused_lora",
    ),
    **dict.fromkeys(
        ("lora_modules_to_save", *PARAMETER_FIELDS, "model_init_kwargs"),
        "trainable_parameters fused_lora",
    ),
    **dict.fromkeys(("lora_dropout", "exclude_modules"), "fused_lora"),
    **dict.fromkeys(("lora_alpha", *SCALE_FIELDS), "lora_scale"),
    "use_peft": "lora_* dtype trainable_parameters *_dtypes gradients_reduced_in fused_lora "
    "fused_loss float8_head fsdp_layers_per_unit",
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), _QUANTIZED),
    "dtype": "frozen_dtypes fused_lora",
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), _BATCH),
    "global_batch_size": f"global_batch {_BATCH}",
    "max_length": "tokens",
    "loss_on": "data.train data.validation tokens",
    "packing": "attn_implementation",
    "fused_loss": "float8_head",
    "compile_layers": "four_bit_weights fused_lora",
    "gradient_checkpointing": "gradient_checkpointing_kwargs activation_checkpointing",
    "torch_compile": "torch_compile_* fused_lora",
    "use_liger_kernel": "liger_kernel_config",
    "lr_scheduler_type": "lr_scheduler_kwargs",
    "chat_template_path": _TURNS,
    "model_name_or_path": f"{_TURNS} model_revision trainable_parameters fsdp_layers_per_unit "
    "float8_head fused_lora mixers",
    "dataset_name": "data.* dataset_config dataset_train_split dataset_shape datasets* columns "
    "dataset_text_from_numbers *_file dataset_*_split tokens quality.fingerprint quality.rows",
}


def differences(runs: Mapping[str, Settings], axes: Sequence[str] = ()) -> Differences:
    """Returns the fields that `axes` do not explain, each with the value of every run that has it.

    What follows from an axis must be equal among the runs of equal axis values: precision explains
    a difference in dtype between fp32 and bf16, not between two runs in bf16. An axis in which the
    runs are equal explains nothing. Only dataset_name stands for other data also where another
    field (dataset_fraction) made them.
    """
    axes = [axis for axis in axes if axis == "dataset_name" or _differs(runs, axis)]
    groups: dict[str, list[str]] = {}
    for name, one in runs.items():
        groups.setdefault(canonical([one.value(axis) for axis in axes]), []).append(name)
    follows = " ".join(f"{axis} {FOLLOWS.get(axis, '')}" for axis in axes)
    found = {}
    for field in dict.fromkeys(field for one in runs.values() for field in one.facts):
        if _is_covered(field, runs) or (axes and _follows_from_sizes(field, runs)):
            continue
        values = _values(field, runs)
        keys = {name: canonical(value) for name, value in values.items()}
        if field == "strategy" and "world_size" in axes:
            # one process has no gradients to average, so its strategy follows from world_size
            keys = {name: '"ddp"' if key == '"single"' else key for name, key in keys.items()}
        parts = groups.values() if matches(field, follows) else [keys]
        if any(len({keys[name] for name in part if name in keys}) > 1 for part in parts):
            found[field] = values
    return found


def _differs(runs: Mapping[str, Settings], axis: str) -> bool:
    return len({canonical(one.value(axis)) for one in runs.values()}) > 1


def _follows_from_sizes(field: str, runs: Mapping[str, Settings]) -> bool:
    """Returns whether runs chose the field by themselves, from sizes that every axis may change.

    They are the same training at another speed. A run says so, and a report has it.
    """
    return field in _FROM_SIZES and all(one.recipe.get(field) is None for one in runs.values())


def _is_covered(field: str, runs: Mapping[str, Settings]) -> bool:
    """Returns whether facts that say more than the field are known of every run and equal."""
    known = [
        {canonical(one.facts.get(fact)) for one in runs.values()}
        for fact in _COVERED_BY.get(field, ())
    ]
    return bool(known) and all(len(values) == 1 and values != {"null"} for values in known)


def _values(field: str, runs: Mapping[str, Settings]) -> dict[str, Any]:
    """Returns a field's value of every run that has it."""
    # a launch variable that is absent is unset; any other absent fact is unknown
    unset = field.startswith("launch.")
    return {name: one.facts.get(field) for name, one in runs.items() if unset or field in one.facts}


def suggest_axes(
    runs: Mapping[str, Settings], axes: Sequence[str] = ()
) -> tuple[list[str], Differences]:
    """Returns axes that explain as much as axes can, and the differences that they leave.

    `axes` are among them. Where none is given and a single one explains everything, it is that
    one. Other data are never suggested.
    """
    recipe_fields = sorted({name for one in runs.values() for name in one.recipe})
    names = [
        name
        for name in dict.fromkeys((*LAUNCH_AXES, *recipe_fields))
        if name != "dataset_name" and not matches(name, BOOKKEEPING) and _differs(runs, name)
    ]
    chosen, left = list(axes), differences(runs, axes)
    while left and names:
        best = min(names, key=lambda name: len(differences(runs, [*chosen, name])))
        rest = differences(runs, [*chosen, best])
        if len(rest) >= len(left):
            break
        chosen, left = [*chosen, best], rest
    return chosen, left


def resolve_axes(
    runs: Mapping[str, Settings], asked: Sequence[str], allow: bool = False, study: bool = False
) -> list[str]:
    """Returns the axes asked for, else the single one that explains all differences, if any.

    `study` says that a study file names the axes, not a command line. Raises ValueError for a name
    that is no axis and, unless `allow`, for runs that differ in more than the axes explain.
    """
    _check_names(runs, asked, study)
    suggested, unexplained = suggest_axes(runs, asked)
    axes = suggested if not asked and len(suggested) == 1 and not unexplained else list(asked)
    left = differences(runs, axes)
    if left and not allow:
        advice = _advice_in_study if study else _advice
        raise ValueError(_refusal(axes, left, advice(suggested, unexplained)))
    return axes


def _check_names(runs: Mapping[str, Settings], asked: Sequence[str], study: bool) -> None:
    fields = (name for one in runs.values() for name in (*one.recipe, *one.facts))
    known = {*LAUNCH_AXES, *CHOSEN, *fields}
    for axis in asked:
        if axis not in known and not axis.startswith("launch."):
            if study and _is_field(axis):
                raise ValueError(f"no cell sets {axis}: leave it out of axis")
            near = difflib.get_close_matches(axis, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{'axis' if study else '--axis'} {axis}: expected a field of a recipe or one of "
                f"{', '.join(LAUNCH_AXES)}{hint}"
            )


def _is_field(name: str) -> bool:
    from sftlab.config.parser import fields_of_recipes  # imports trl, which takes time

    return name in fields_of_recipes()


def _refusal(axes: Sequence[str], left: Differences, advice: str) -> str:
    """Returns what the runs differ in, and what to type next."""
    more_than = f"the axis {', '.join(axes)}" if axes else "one setting"
    lines = [f"these runs differ in more than {more_than}, so a figure has more than one cause:"]
    lines += [f"  {line}" for line in describe(left)]
    if "lora_scale" in left:
        lines.append(
            "lora_scale is lora_alpha / lora_r: train with an alpha that follows the rank."
        )
    return "\n".join([*lines, advice])


def _advice(suggested: Sequence[str], unexplained: Differences) -> str:
    never = f" (no axis explains {', '.join(unexplained)})" if unexplained else ""
    return (
        f"Name what is compared (--axis {' '.join(suggested) or 'FIELD'}{never}), give fewer runs, "
        "or pass --allow-confounded"
    )


def _advice_in_study(suggested: Sequence[str], unexplained: Differences) -> str:
    # every fact that differs may be named there, also one that follows from several fields
    names = ", ".join([*suggested, *unexplained])
    return (
        f"Name what is compared in the study file (axis: [{names}]), let the cells differ in less, "
        "or pass --allow-confounded"
    )


def moving_together(runs: Mapping[str, Settings], axes: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the pairs of axes that change together, so that their effects cannot be separated.

    Each value of one goes with exactly one value of the other.
    """
    values = {axis: [canonical(one.value(axis)) for one in runs.values()] for axis in axes}

    def together(a: str, b: str) -> bool:
        pairs = set(zip(values[a], values[b], strict=True))
        return len(pairs) == len(set(values[a])) == len(set(values[b])) > 1

    return [(a, b) for a, b in combinations(axes, 2) if together(a, b)]


def replicas(runs: Mapping[str, Settings]) -> list[list[str]]:
    """Returns groups of two or more runs that differ in nothing but their seed.

    How their scores were found does not count.
    """
    groups: dict[str, list[str]] = {}
    for name, one in runs.items():
        same = {k: v for k, v in one.facts.items() if k != "seed" and not k.startswith("quality.")}
        groups.setdefault(canonical(same), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def describe(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns a line for each differing field: `lora_r: 8 (a, b) | 16 (c)`."""
    lines = []
    for field, values in found.items():
        names: dict[str, list[str]] = {}
        for name, value in values.items():
            names.setdefault(short(value), []).append(name)
        parts = [f"{value} ({_first_three(who)})" for value, who in names.items()]
        lines.append(f"{field}: {' | '.join(parts)}")
    return lines


def _first_three(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def short(value: Any) -> str:
    """Returns a setting as a person reads it, of at most 70 characters."""
    if isinstance(value, list):
        text = " ".join(map(str, value))
    else:
        text = json.dumps(value, default=str).strip('"')
    return preview("none" if text in ("", "null") else text, 70)


def in_order(value: Any) -> tuple:
    """Returns the sorting key of an axis value.

    Numbers sort by size, precisions from fine to coarse, lists by length.
    """
    if isinstance(value, bool | int | float):
        return (0, value, "")
    precisions, place = list(COMPUTE_DTYPE), 0
    if isinstance(value, list):
        place = len(value)
    elif value in precisions:
        place = precisions.index(value)
    return (1, place, short(value))
