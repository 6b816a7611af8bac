"""Ends a training whose validation loss no longer improves."""

from typing import Any

from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


class EarlyStopping(EarlyStoppingCallback):
    """transformers' callback, which also continues exactly.

    transformers writes its count into every checkpoint, but a continued run begins to count anew,
    and one that had stopped goes on.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Go on with the count of the checkpoint."""
        self.early_stopping_patience_counter = _count(state, type(self).__name__)

    @property
    def stopped(self) -> bool:
        """Whether the patience is used up."""
        return self.early_stopping_patience_counter >= self.early_stopping_patience

    def had_stopped(self, state: TrainerState) -> bool:
        """Whether the patience was used up when a checkpoint with this state was saved."""
        return _count(state, type(self).__name__) >= self.early_stopping_patience


def _count(state: TrainerState, name: str) -> int:
    saved: dict[str, Any] = (state.stateful_callbacks or {}).get(name, {})
    return saved.get("attributes", {}).get("early_stopping_patience_counter", 0)


def early_stopping_of(callbacks: list[TrainerCallback]) -> EarlyStopping | None:
    """Returns the early stopping among the callbacks of a trainer; None without one."""
    return next((one for one in callbacks if isinstance(one, EarlyStopping)), None)


def stopped_early(trainer: Trainer) -> str | None:
    """Returns a sentence that says when and why a training stopped early; None if it did not."""
    state, stopping = trainer.state, early_stopping_of(trainer.callback_handler.callbacks)
    if not stopping or not stopping.stopped or state.global_step >= state.max_steps:
        return None
    losses = [(one["eval_loss"], one["step"]) for one in state.log_history if "eval_loss" in one]
    loss, step = min(losses)
    return (
        f"stopped early at step {state.global_step} of {state.max_steps}: eval_loss has not "
        f"improved in {stopping.early_stopping_patience} evaluations; the best is {loss:.4f} at "
        f"step {step}"
    )
