"""Does a recipe agree with itself and with the launch config, and what follows from them?

`resolve` refuses contradictions and fills in what the recipe leaves open.
"""

import math

from sftlab.config.launch import COMPUTE_DTYPE, PRECISIONS, Launch
from sftlab.config.lora_start import check_start
from sftlab.config.lora_variants import float8_conflict
from sftlab.config.pairs import resolve_method
from sftlab.config.recipe import DataArguments, ModelArguments, Recipe, TrainingArguments
from sftlab.config.schedule import (
    refuse_answers_never_asked,
    refuse_unknown_metric,
    refuse_wrong_schedule,
    resolve_early_stopping,
)
from sftlab.config.value_checks import check_values


def is_bitsandbytes(optim: str) -> bool:
    """Returns whether bitsandbytes implements the optimizer of this name."""
    return any(word in optim for word in ("paged", "bnb", "8bit", "lion"))


def resolve(recipe: Recipe, launch: Launch) -> None:
    """Fill in dtype, micro-batch and accumulation where the recipe leaves them open.

    Raises ValueError for a field that is missing, out of range, or in contradiction with
    another field or the launch config.
    """
    _check_required(recipe)
    _check_lora(recipe.model)
    _check_loraplus(recipe.training, recipe.model)
    streaming = recipe.data.dataset_streaming
    check_start(recipe.model, launch, recipe.training.mixed_precision, streaming)
    resolve_method(recipe, launch)
    check_values(recipe)
    refuse_wrong_schedule(recipe.training)
    refuse_unknown_metric(recipe.training)
    resolve_early_stopping(recipe.training)
    refuse_answers_never_asked(recipe.training, launch.strategy)
    _check_data(recipe)
    _check_rows(recipe.data, recipe.training)
    _check_fsdp(recipe, launch)
    _resolve_precision(recipe)
    _resolve_batch(recipe, launch.world_size)
    _resolve_gradient_order(recipe.training, launch)


def _check_required(recipe: Recipe) -> None:
    for name, value in (
        ("model_name_or_path", recipe.model.model_name_or_path),
        ("dataset_name", recipe.data.dataset_name),
    ):
        if not value:
            raise ValueError(f"{name} is missing: set it in the recipe or pass --{name}")
    if "output_dir" not in recipe.given:
        raise ValueError(
            "output_dir is missing: set it in the recipe or pass --output_dir runs/NAME"
        )


def _check_lora(model: ModelArguments) -> None:
    if model.lora_r <= 0:
        raise ValueError(f"lora_r is {model.lora_r}: the rank must be 1 or more")
    if model.lora_alpha <= 0:
        raise ValueError(
            f"lora_alpha is {model.lora_alpha}: it must be positive (twice lora_r is usual)"
        )
    if model.lora_bias and (model.use_dora or model.lora_target_parameters):
        other = "use_dora" if model.use_dora else "lora_target_parameters"
        raise ValueError(f"lora_bias does not go with {other}: leave one of them out")
    if model.use_peft and not model.lora_target_modules:
        raise ValueError(
            "lora_target_modules is unset, and PEFT would take q_proj and v_proj without a "
            "word: name the modules"
        )


def _check_loraplus(training: TrainingArguments, model: ModelArguments) -> None:
    ratio = training.loraplus_lr_ratio
    if ratio is None:
        return
    if not 0 < ratio < math.inf:
        raise ValueError(f"loraplus_lr_ratio is {ratio}: it must be positive (16 is usual)")
    if not model.use_peft:
        raise ValueError("loraplus_lr_ratio needs use_peft: true, as only LoRA has B matrices")
    if training.optim_target_modules:
        raise ValueError(
            f"loraplus_lr_ratio does not go with optim: {training.optim}, which has groups of its "
            "own: leave one of them out"
        )


def _check_data(recipe: Recipe) -> None:
    """Raise ValueError for fields of the data set that contradict one another."""
    data, given = recipe.data, recipe.given
    if data.datasets:
        for name in ("dataset_name", "dataset_config", "dataset_train_split"):
            if name in given:
                raise ValueError(
                    f"{name} and datasets are both given: say in datasets what is mixed, with the "
                    "keys name, config and split of each"
                )
    weighted = data.datasets and "weight" in data.datasets[0]
    if "datasets_stopping_strategy" in given and not weighted:
        raise ValueError(
            "datasets_stopping_strategy has no effect without weights: give datasets as "
            "NAME=WEIGHT, or leave it out"
        )
    for index, split in ((1, "validation"), (2, "test")):
        file, of_hub = getattr(data, f"{split}_file"), getattr(data, f"dataset_{split}_split")
        if file and of_hub:
            raise ValueError(
                f"{split}_file and dataset_{split}_split both give the {split} rows: give one"
            )
        if of_hub and data.datasets:
            raise ValueError(
                f"dataset_{split}_split belongs to dataset_name, and datasets is given: give "
                f"{split}_file"
            )
        if (file or of_hub) and "split_fractions" in given and data.split_fractions[index]:
            field = f"{split}_file" if file else f"dataset_{split}_split"
            raise ValueError(
                f"split_fractions gives {split} a share of {data.split_fractions[index]}, and "
                f"{field} gives its rows: make the share 0"
            )


def _check_rows(data: DataArguments, training: TrainingArguments) -> None:
    if training.max_length is not None and training.max_length < 1:
        raise ValueError(
            f"max_length is {training.max_length}: give the most tokens that a row may have"
        )
    if not 0 < data.dataset_fraction <= 1:
        raise ValueError(
            f"dataset_fraction is {data.dataset_fraction}: it must be above 0 and at most 1"
        )
    shares = data.split_fractions
    three = len(shares) == 3 and min(shares) >= 0 and shares[0] > 0
    if not three or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(
            f"split_fractions is {shares}: give three shares (train, validation, test) that sum "
            "to 1"
        )
    own = data.validation_file or data.dataset_validation_split
    if shares[1] == 0 and not own and (training.eval_strategy != "no" or training.eval_on_start):
        raise ValueError(
            f"split_fractions is {shares}, without validation rows, and evaluation is asked for: "
            "give validation a share or pass --eval_strategy no"
        )
    if data.dataset_streaming and training.max_steps <= 0:
        raise ValueError(
            "dataset_streaming needs max_steps: the length of a stream is not known beforehand"
        )


def _check_fsdp(recipe: Recipe, launch: Launch) -> None:
    training = recipe.training
    version = launch.settings.get("FSDP_VERSION") if launch.strategy == "fsdp" else None
    if training.fsdp_layers_per_unit is not None and version != "2":
        raise ValueError(
            "fsdp_layers_per_unit belongs to FSDP2: launch with fsdp.yaml, or leave it out"
        )
    if launch.strategy != "fsdp":
        return
    if is_bitsandbytes(training.optim):
        raise ValueError(
            f"optim {training.optim.value} is bitsandbytes', which does not update FSDP2's sharded "
            "parameters: pass --optim adamw_torch_fused"
        )
    one_reads = launch.settings.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() == "true"
    if one_reads and training.mixed_precision == "fp8":
        raise ValueError(
            "fp8 rounds the weights in every process: leave fsdp_cpu_ram_efficient_loading false"
        )
    if training.mixed_precision == "fp8" and recipe.model.load_in_4bit:
        raise ValueError(
            "fp8 with load_in_4bit needs the scales of the weights, which FSDP2 does not gather: "
            "launch with fp8.yaml and --num_processes for DDP, or leave load_in_4bit out"
        )


def _resolve_precision(recipe: Recipe) -> None:
    """Fill in `dtype`, and refuse one that contradicts the launch config's precision."""
    model = recipe.model
    precision = PRECISIONS[recipe.training.mixed_precision]
    compute = COMPUTE_DTYPE[precision]
    if model.dtype not in (None, compute, "float32"):
        fitting = "single" if model.dtype == "bfloat16" else "fp16"
        raise ValueError(
            f"the recipe's dtype is {model.dtype}, which contradicts the launch config's precision "
            f"{precision}: launch with {fitting}.yaml or pass --dtype {compute}"
        )
    if precision == "fp8" and (why := _fp8_conflict(model)):
        raise ValueError(f"fp8 rounds the frozen weights, and {why}: launch with single.yaml")
    # trained weights keep float32 copies; autocast computes in the launch config's precision
    model.dtype = model.dtype or (compute if model.use_peft else "float32")


def _fp8_conflict(model: ModelArguments) -> str | None:
    """Returns why the model's weights cannot be rounded to float8; None where they can."""
    if not model.use_peft:
        return "use_peft: false trains them"
    if model.load_in_8bit:
        return "load_in_8bit has products of its own"
    return float8_conflict(model)


def _resolve_batch(recipe: Recipe, world_size: int) -> None:
    """Derive micro-batch and accumulation from `global_batch_size`.

    So the launch config does not change the global batch.
    """
    data, training = recipe.data, recipe.training
    per_device, total = training.per_device_train_batch_size, data.global_batch_size
    if not total:
        data.global_batch_size = per_device * training.gradient_accumulation_steps * world_size
        return
    if total % world_size:
        raise ValueError(
            f"global_batch_size {total} does not divide into {world_size} processes: give a "
            f"multiple of {world_size}"
        )
    per_device = min(per_device, total // world_size)
    accumulation, rest = divmod(total, per_device * world_size)
    if rest:
        raise ValueError(
            f"global_batch_size {total} is not a multiple of per_device_train_batch_size "
            f"{per_device} x {world_size} processes: change one of them"
        )
    asked = training.gradient_accumulation_steps
    if "gradient_accumulation_steps" in recipe.given and asked != accumulation:
        raise ValueError(
            f"gradient_accumulation_steps {asked} and global_batch_size {total} contradict each "
            f"other (the batch takes {accumulation} steps): give one of the two"
        )
    training.per_device_train_batch_size = per_device
    training.gradient_accumulation_steps = accumulation


def _resolve_gradient_order(training: TrainingArguments, launch: Launch) -> None:
    """Keep the order in which DDP sums gradients the same after every start."""
    if launch.world_size > 2 and (training.deterministic or launch.hides_gpus):
        # DDP regroups gradients into buckets after the first step of a start, unless it looks for
        # unused parameters. With three or more processes a gradient's place in its bucket decides
        # the order of the sum.
        training.ddp_find_unused_parameters = True
