"""A recipe agrees with itself and with the launch config, or is refused.

What it leaves open follows from them.
"""

from sftlab.config.launch import COMPUTE_DTYPE, PRECISIONS, Launch
from sftlab.config.recipe import Recipe


def of_bitsandbytes(optim: str) -> bool:
    """Whether an optimizer of this name is bitsandbytes'."""
    return any(word in optim for word in ("paged", "bnb", "8bit", "lion"))


def settle(recipe: Recipe, launch: Launch) -> None:
    """Fill in what the recipe leaves open: dtype, micro-batch and accumulation.

    Raises ValueError with one sentence for what is missing, cannot be, or contradicts the rest or
    the launch config.
    """
    data, training, model = recipe.data, recipe.training, recipe.model
    for name, value in (
        ("model_name_or_path", model.model_name_or_path),
        ("dataset_name", data.dataset_name),
    ):
        if not value:
            raise ValueError(f"{name} is missing: set it in the recipe or pass --{name}")
    if "output_dir" not in recipe.given:
        raise ValueError(
            "output_dir is missing: set it in the recipe or pass --output_dir runs/NAME"
        )
    if model.lora_r <= 0:
        raise ValueError(f"lora_r is {model.lora_r}: the rank must be 1 or more")
    if model.lora_alpha <= 0:
        raise ValueError(
            f"lora_alpha is {model.lora_alpha}: it must be positive (usual is twice lora_r)"
        )
    if model.use_peft and not model.lora_target_modules:
        raise ValueError(
            "lora_target_modules is unset (PEFT would silently take q_proj and v_proj only): name "
            "the modules"
        )
    if training.max_length is not None and training.max_length < 1:
        raise ValueError(
            f"max_length is {training.max_length}: give the most tokens that a row may have"
        )
    if not 0 < data.dataset_fraction <= 1:
        raise ValueError(
            f"dataset_fraction is {data.dataset_fraction}: it must be above 0 and at most 1"
        )
    fractions = data.split_fractions
    if (
        len(fractions) != 3
        or min(fractions) < 0
        or fractions[0] <= 0
        or abs(sum(fractions) - 1) > 1e-6
    ):
        raise ValueError(
            f"split_fractions is {fractions}: give three shares, train, validation and test, that "
            "sum to 1"
        )
    if fractions[1] == 0 and (training.eval_strategy != "no" or training.eval_on_start):
        raise ValueError(
            f"split_fractions is {fractions}, without validation rows, and evaluation is asked "
            "for: give them a share "
            f"or pass --eval_strategy no"
        )
    if data.dataset_streaming and training.max_steps <= 0:
        raise ValueError(
            "dataset_streaming needs max_steps: the length of a stream is not known beforehand"
        )
    if launch.strategy == "fsdp" and of_bitsandbytes(training.optim):
        raise ValueError(
            f"optim {training.optim.value} is bitsandbytes', which does not update the sharded "
            "parameters of FSDP2: "
            f"pass --optim adamw_torch_fused"
        )
    one_reads = launch.settings.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() == "true"
    if launch.strategy == "fsdp" and one_reads and training.mixed_precision == "fp8":
        raise ValueError(
            "fp8 rounds the weights in every process: leave fsdp_cpu_ram_efficient_loading false"
        )
    _settle_precision(recipe)
    _settle_batch(recipe, launch.world_size)
    if launch.world_size > 2 and (training.deterministic or launch.hides_gpus):
        # DDP deals gradients to buckets anew after the first step of a start, unless it looks for
        # unused parameters; of three or more processes' gradients the place in a bucket decides the
        # order of the sum
        training.ddp_find_unused_parameters = True


def _settle_precision(recipe: Recipe) -> None:
    """Refuse a recipe whose dtype contradicts the launch config's precision.

    Fill in `dtype` where it is unset.
    """
    model = recipe.model
    precision = PRECISIONS[recipe.training.mixed_precision]
    compute = COMPUTE_DTYPE[precision]
    if model.dtype not in (None, compute, "float32"):
        raise ValueError(
            f"the recipe's dtype is {model.dtype} and the launch config's precision {precision}: "
            "they contradict each "
            f"other; launch with {'bf16' if model.dtype == 'bfloat16' else 'fp16'}.yaml or leave "
            "dtype out"
        )
    for asked, why in (
        (not model.use_peft, "use_peft: false trains them"),
        (model.use_dora, "use_dora needs the norms of the exact ones"),
        (
            model.load_in_4bit or model.load_in_8bit,
            "load_in_4bit and load_in_8bit round them otherwise",
        ),
    ):
        if asked and precision == "fp8":
            raise ValueError(f"fp8 rounds the frozen weights, and {why}: launch with bf16.yaml")
    # weights that train keep float32 copies; autocast computes in the precision
    model.dtype = model.dtype or (compute if model.use_peft else "float32")


def _settle_batch(recipe: Recipe, world_size: int) -> None:
    """Derive micro-batch and accumulation from `global_batch_size`, so that the launch config does
    not change it.
    """
    data, training = recipe.data, recipe.training
    per_device, total = training.per_device_train_batch_size, data.global_batch_size
    if not total:
        data.global_batch_size = per_device * training.gradient_accumulation_steps * world_size
        return
    if total % world_size:
        raise ValueError(f"global_batch_size {total} does not divide into {world_size} processes")
    per_device = min(per_device, total // world_size)
    accumulation, rest = divmod(total, per_device * world_size)
    if rest:
        raise ValueError(
            f"global_batch_size {total} is not a multiple of per_device_train_batch_size "
            f"{per_device} x "
            f"{world_size} processes"
        )
    if (
        "gradient_accumulation_steps" in recipe.given
        and training.gradient_accumulation_steps != accumulation
    ):
        raise ValueError(
            f"gradient_accumulation_steps {training.gradient_accumulation_steps} and "
            f"global_batch_size {total} "
            f"contradict each other (it would take {accumulation}): give one of the two"
        )
    training.per_device_train_batch_size, training.gradient_accumulation_steps = (
        per_device,
        accumulation,
    )
