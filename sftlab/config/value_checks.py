"""Is every number of a recipe one that training can use, and every word one that its field knows?

Nothing here depends on the machine.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from sftlab.config.preference_fields import LOSSES
from sftlab.config.recipe import Recipe, TrainingArguments


class Range(NamedTuple):
    """The numbers that a field may have, and their name in a message. NaN is in none."""

    words: str
    holds: Callable[[float], bool]


_ABOVE_0 = Range("a finite number above 0", lambda value: 0 < value < math.inf)
_AT_LEAST_0 = Range("a finite number of at least 0", lambda value: 0 <= value < math.inf)
_AT_LEAST_1 = Range("at least 1", lambda value: 1 <= value < math.inf)
_BELOW_1 = Range("at least 0 and below 1", lambda value: 0 <= value < 1)
_SHARE = Range("from 0 to 1", lambda value: 0 <= value <= 1)
_SEED = Range(f"from 0 to {2**32 - 1}", lambda value: 0 <= value < 2**32)
# Far above every scale that trains.
_ALPHA = Range("at most 1,000,000 (twice lora_r is usual)", lambda value: value <= 1_000_000)
# Above every layer's size, where a rank means nothing.
_RANK = Range("from 1 to 65,536", lambda value: 1 <= value <= 65_536)
# More processes only wait for memory and for each other.
_WORKERS = Range("from 0 to 1,024", lambda value: 0 <= value <= 1024)
# Far above every training.
MOST_STEPS, MOST_EPOCHS = 1_000_000_000, 1_000_000
_FIELDS = {
    _ABOVE_0: """learning_rate adam_epsilon neftune_noise_alpha logging_steps save_steps eval_steps
        beta discopop_tau""",
    _AT_LEAST_0: """weight_decay max_grad_norm router_aux_loss_coef warmup_steps eval_delay
        global_batch_size early_stopping_threshold""",
    _AT_LEAST_1: """per_device_train_batch_size per_device_eval_batch_size save_total_limit
        gradient_accumulation_steps streaming_eval_rows pad_to_multiple_of dataset_num_proc
        dataloader_prefetch_factor ddp_timeout ddp_bucket_cap_mb torch_empty_cache_steps
        early_stopping_patience answers_during_training fsdp_layers_per_unit""",
    _BELOW_1: "adam_beta1 adam_beta2 lora_dropout",
    _SHARE: "label_smoothing_factor label_smoothing ld_alpha",
    _SEED: "seed data_seed",
    _ALPHA: "lora_alpha",
    _RANK: "lora_r",
    _WORKERS: "dataloader_num_workers",
}
RANGES = {name: numbers for numbers, names in _FIELDS.items() for name in names.split()}
# intervals that another field can switch off
_UNUSED = {
    "eval_steps": "eval_strategy",
    "save_steps": "save_strategy",
    "logging_steps": "logging_strategy",
}
WORDS = {
    "truncation_mode": ("keep_start", "keep_end"),
    "loss_type": ("nll", "dft"),
    "train_sampling_strategy": ("random", "sequential"),
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_quant_storage": ("uint8", "float16", "float32", "bfloat16"),
    "ddp_backend": ("nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl"),
    "dataloader_multiprocessing_context": ("fork", "spawn", "forkserver"),
}
# torch.utils.checkpoint.checkpoint, without what is no plain value
CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug")
_TRACKIO_FIELDS = ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")


def check_values(recipe: Recipe) -> None:
    """Raise ValueError for a number or a word that its field cannot mean."""
    for name, numbers in RANGES.items():
        value, by = _value(name, recipe), _UNUSED.get(name)
        if not isinstance(value, int | float) or (by and getattr(recipe.training, by) != "steps"):
            continue
        if not numbers.holds(value):
            raise ValueError(f"{name} is {value}: it must be {numbers.words}")
    for name, words in WORDS.items():
        if (name, recipe.training.method) == ("loss_type", "dpo"):
            words = LOSSES
        found = _value(name, recipe)
        for value in found if isinstance(found, list) else [found]:
            if value is None or value in words:
                continue
            raise ValueError(f"{name} is {value!r}: expected {' or '.join(words)}")
    _check_length(recipe.training)
    _check_checkpointing(recipe.training)
    _check_padding(recipe.training)
    _check_tracker_fields(recipe.training)


def _value(name: str, recipe: Recipe) -> Any:
    groups = (recipe.data, recipe.training, recipe.model)
    return next((getattr(group, name) for group in groups if hasattr(group, name)), None)


def _check_length(training: TrainingArguments) -> None:
    steps, epochs, warmup = training.max_steps, training.num_train_epochs, training.warmup_steps
    if steps != -1 and not 1 <= steps <= MOST_STEPS:
        raise ValueError(
            f"max_steps is {steps}: expected a whole number from 1 to {MOST_STEPS:,}, or -1 for "
            "whole epochs"
        )
    if steps == -1 and not 0 < epochs <= MOST_EPOCHS:
        raise ValueError(
            f"num_train_epochs is {epochs}: expected a number above 0, up to {MOST_EPOCHS:,}"
        )
    if warmup > 1 and warmup != int(warmup):
        raise ValueError(
            f"warmup_steps is {warmup}: expected a whole number, or a share of all steps below 1"
        )


def _check_checkpointing(training: TrainingArguments) -> None:
    """Raise ValueError for a key that torch's checkpointing does not know."""
    for key in training.gradient_checkpointing_kwargs or {}:
        if key not in CHECKPOINTING:
            raise ValueError(
                f"gradient_checkpointing_kwargs has {key!r}: expected {' or '.join(CHECKPOINTING)}"
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
