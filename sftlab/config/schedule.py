"""Does a schedule exist, and do the best checkpoint and early stopping go by the loss?

Nothing here depends on the machine.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn, optim
from transformers import get_scheduler

from sftlab.config.recipe import TrainingArguments


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


def resolve_early_stopping(training: TrainingArguments) -> None:
    """Let early stopping look at `eval_loss`.

    Raises ValueError without evaluations, and for a threshold without patience.
    """
    patience = training.early_stopping_patience
    if patience is None:
        if training.early_stopping_threshold:
            raise ValueError(
                "early_stopping_threshold has no effect without early_stopping_patience: give "
                "both, or leave it out"
            )
        return
    if training.eval_strategy == "no":
        raise ValueError(
            "early_stopping_patience counts evaluations, and eval_strategy is no: pass "
            "--eval_strategy steps --eval_steps N, or leave it out"
        )
    # transformers keeps the best loss only where the metric is named
    training.metric_for_best_model = training.metric_for_best_model or "loss"


def refuse_answers_never_asked(training: TrainingArguments, strategy: str) -> None:
    """Raise ValueError where answers during the training are asked for and cannot be generated."""
    if not training.answers_during_training:
        return
    if training.eval_strategy == "no" and not training.eval_on_start:
        raise ValueError(
            "answers_during_training belongs to evaluations, and eval_strategy is no: pass "
            "--eval_strategy steps --eval_steps N, or leave it out"
        )
    if strategy == "fsdp":
        raise ValueError(
            "answers_during_training does not generate from sharded weights: launch with ddp.yaml, "
            "or leave it out"
        )


def warmup_share(recipe: Mapping[str, Any]) -> float:
    """Returns the share of the learning rate that a recipe's warmup reaches; 1 is all of it.

    It is below 1 where the warmup outlasts `max_steps`.
    """
    steps, warmup = recipe.get("max_steps") or 0, recipe.get("warmup_steps") or 0
    return steps / warmup if 0 < steps < warmup else 1.0


def late_warmup(training: TrainingArguments) -> str | None:
    """Returns a sentence where the warmup outlasts `max_steps`; None where it does not."""
    steps, warmup = training.max_steps, training.warmup_steps
    if warmup_share(vars(training)) == 1:
        return None
    return (
        f"warmup_steps is {warmup:g} and max_steps {steps}, so the learning rate never reaches "
        f"{training.learning_rate:g}: give fewer warmup_steps, or a share such as 0.05"
    )
