"""Is every number of a recipe one that training can use, and does the schedule take its arguments?

Nothing here depends on the machine.
"""

import torch
from torch import nn, optim
from transformers import get_scheduler

from sftlab.config.recipe import Recipe, TrainingArguments

_ANY = float("inf")
_BELOW_1 = 1 - 1e-9
# field: least and most; a field that is None is left to its default
RANGES = {
    "learning_rate": (0, _ANY),
    "weight_decay": (0, _ANY),
    "max_grad_norm": (0, _ANY),
    "adam_beta1": (0, _BELOW_1),
    "adam_beta2": (0, _BELOW_1),
    "adam_epsilon": (0, _ANY),
    "label_smoothing_factor": (0, 1),
    "neftune_noise_alpha": (0, _ANY),
    "lora_dropout": (0, _BELOW_1),
    "per_device_train_batch_size": (1, _ANY),
    "per_device_eval_batch_size": (1, _ANY),
    "gradient_accumulation_steps": (1, _ANY),
    "global_batch_size": (0, _ANY),
    "eval_accumulation_steps": (1, _ANY),
    "logging_steps": (1e-9, _ANY),
    "save_steps": (1e-9, _ANY),
    "eval_steps": (1e-9, _ANY),
    "eval_delay": (0, _ANY),
    "save_total_limit": (1, _ANY),
    "streaming_eval_rows": (0, _ANY),
    "pad_to_multiple_of": (1, _ANY),
    "dataset_num_proc": (1, _ANY),
    "dataloader_num_workers": (0, _ANY),
    "dataloader_prefetch_factor": (1, _ANY),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
}
# intervals that another field can switch off
_UNUSED = {
    "eval_steps": ("eval_strategy", "steps"),
    "save_steps": ("save_strategy", "steps"),
    "logging_steps": ("logging_strategy", "steps"),
}
_WORDS = {_BELOW_1: "below 1", 1e-9: "above 0"}


def refuse_out_of_range(recipe: Recipe) -> None:
    """Raise ValueError for a number that training cannot use."""
    groups = (recipe.data, recipe.training, recipe.model)
    for name, (least, most) in RANGES.items():
        value = next((getattr(group, name) for group in groups if hasattr(group, name)), None)
        by, used = _UNUSED.get(name, (None, None))
        if value is None or (by and getattr(recipe.training, by) != used):
            continue
        if not least <= value <= most:  # NaN is refused too
            words = [_WORDS.get(least, f"at least {least}")]
            words += [_WORDS.get(most, f"at most {most}")] if most != _ANY else []
            raise ValueError(f"{name} is {value}: it must be {' and '.join(words)}")
    training = recipe.training
    if training.max_steps <= 0 and not training.num_train_epochs > 0:
        raise ValueError(
            f"num_train_epochs is {training.num_train_epochs} and max_steps is "
            f"{training.max_steps}: one of them must be above 0"
        )


def refuse_wrong_schedule(training: TrainingArguments) -> None:
    """Raise ValueError for a learning rate schedule that does not take its arguments.

    The schedule is built for a parameter of its own, and asked for a few learning rates.
    """
    name, steps = training.lr_scheduler_type.value, max(training.max_steps, 100)
    optimizer = optim.SGD([nn.Parameter(torch.zeros(1))], lr=training.learning_rate or 1.0)
    try:
        schedule = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=training.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=training.lr_scheduler_kwargs,
        )
        optimizer.step()
        for _ in range(3):
            schedule.step(1.0) if name in ("reduce_lr_on_plateau", "greedy") else schedule.step()
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"lr_scheduler_type {name} cannot be used with lr_scheduler_kwargs "
            f"{training.lr_scheduler_kwargs or 'unset'}: {error}"
        ) from error


def refuse_unknown_metric(training: TrainingArguments) -> None:
    """Raise ValueError for a `metric_for_best_model` that no evaluation gives."""
    metric = training.metric_for_best_model
    if metric not in (None, "loss", "eval_loss"):
        raise ValueError(
            f"metric_for_best_model is {metric!r}, and an evaluation gives eval_loss alone: "
            "leave it out"
        )
    if training.greater_is_better and metric:
        raise ValueError(
            "greater_is_better is true, and a smaller eval_loss is better: leave it out"
        )
