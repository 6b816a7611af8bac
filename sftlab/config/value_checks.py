"""Do the words of a recipe, its length and its trackers mean something?

config/ranges.py has the range of every number. Here are those that must be finite or above 0, and
the fields whose words are a short list.
"""

import math
from typing import Any

from sftlab.config.recipe import Recipe, TrainingArguments

_ABOVE_0 = ("learning_rate", "adam_epsilon", "neftune_noise_alpha")
_FINITE = (
    *("weight_decay", "max_grad_norm", "label_smoothing_factor", "router_aux_loss_coef"),
    *("warmup_steps", "eval_delay", "logging_steps", "save_steps", "eval_steps"),
)
# Far above every scale that trains.
_MOST_ALPHA = 1_000_000
_AT_LEAST_1 = ("ddp_timeout", "ddp_bucket_cap_mb", "torch_empty_cache_steps", "streaming_eval_rows")
WORDS = {
    "truncation_mode": ("keep_start", "keep_end"),
    "loss_type": ("nll", "dft"),
    "train_sampling_strategy": ("random", "sequential"),
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_quant_storage": ("uint8", "float16", "float32", "bfloat16"),
    "ddp_backend": ("nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl"),
    "dataloader_multiprocessing_context": ("fork", "spawn", "forkserver"),
}
_TRACKIO_FIELDS = ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")


def check_values(recipe: Recipe) -> None:
    """Raise ValueError for a number or a word that its field cannot mean."""
    for name in (*_ABOVE_0, *_FINITE, *_AT_LEAST_1):
        value = _value(name, recipe)
        if not isinstance(value, int | float):
            continue
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} is {value}: expected a finite number of at least 0")
        if name in _ABOVE_0 and value == 0:
            raise ValueError(f"{name} is {value}: expected a number above 0")
        if name in _AT_LEAST_1 and value < 1:
            raise ValueError(f"{name} is {value}: expected a whole number of at least 1")
    if recipe.model.lora_alpha > _MOST_ALPHA:
        raise ValueError(
            f"lora_alpha is {recipe.model.lora_alpha}: expected at most {_MOST_ALPHA:,} (twice "
            "lora_r is usual)"
        )
    for name, words in WORDS.items():
        value = _value(name, recipe)
        if value is not None and value not in words:
            raise ValueError(f"{name} is {value!r}: expected {' or '.join(words)}")
    _check_length(recipe.training)
    _check_padding(recipe.training)
    _check_tracker_fields(recipe.training)


def _value(name: str, recipe: Recipe) -> Any:
    groups = (recipe.data, recipe.training, recipe.model)
    return next((getattr(group, name) for group in groups if hasattr(group, name)), None)


def _check_length(training: TrainingArguments) -> None:
    steps, epochs, warmup = training.max_steps, training.num_train_epochs, training.warmup_steps
    if steps != -1 and steps < 1:
        raise ValueError(
            f"max_steps is {steps}: expected a whole number of at least 1, or -1 for whole epochs"
        )
    if steps == -1 and not (0 < epochs < math.inf):
        raise ValueError(f"num_train_epochs is {epochs}: expected a finite number above 0")
    if warmup > 1 and warmup != int(warmup):
        raise ValueError(
            f"warmup_steps is {warmup}: expected a whole number, or a share of all steps below 1"
        )


def late_warmup(training: TrainingArguments) -> str | None:
    """Returns a sentence where the warmup outlasts `max_steps`; None where it does not."""
    steps, warmup = training.max_steps, training.warmup_steps
    if not 0 < steps < warmup:
        return None
    return (
        f"warmup_steps is {warmup:g} and max_steps {steps}, so the learning rate never reaches "
        f"{training.learning_rate:g}: give fewer warmup_steps, or a share such as 0.05"
    )


def _check_padding(training: TrainingArguments) -> None:
    multiple = training.pad_to_multiple_of
    if multiple in (None, "auto"):
        return
    if not str(multiple).isdigit() or int(multiple) < 1:
        raise ValueError(
            f"pad_to_multiple_of is {multiple!r}: expected a whole number of at least 1, or auto"
        )


def _check_tracker_fields(training: TrainingArguments) -> None:
    """Raise ValueError for a field of a tracker that `report_to` does not name."""
    trackers = training.report_to or []
    for name in _TRACKIO_FIELDS:
        if getattr(training, name, None) and "trackio" not in trackers:
            raise ValueError(f"{name} has no effect: add trackio to report_to, or leave it out")
    if training.run_name and not set(trackers) - {"tensorboard"}:
        raise ValueError(
            "run_name has no effect: TensorBoard's curves are in output_dir; leave it out"
        )
