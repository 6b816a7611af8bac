"""What a trainer adds up between two logs, so that a resumed run logs the same figures."""

from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from trl import SFTTrainer


class TokenMetrics(NamedTuple):
    """Means over the tokens in the loss since the last log, and the real tokens, of all ranks."""

    entropy: float
    token_accuracy: float
    real_tokens: int


class TokenSums:
    """Entropy and hits of the tokens in the loss, summed on the device and read once a log."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: torch.Tensor | None = None
        self._real_tokens = 0

    def add(self, sums: torch.Tensor, real_tokens: int) -> None:
        """Add one micro-batch: the sums of its entropies, hits and tokens in the loss, [3]."""
        self._sums = sums if self._sums is None else self._sums + sums
        self._real_tokens += real_tokens

    def take(self, accelerator: Accelerator) -> TokenMetrics | None:
        """Returns the metrics since the last call and starts anew; None if nothing was added.

        Every process calls it: the sums are reduced over all of them.
        """
        if self._sums is None:
            return None
        real_tokens = self._sums.new_tensor([self._real_tokens], dtype=torch.float64)
        sums = torch.cat([self._sums.double(), real_tokens])
        entropy, hits, tokens, real = accelerator.reduce(sums, reduction="sum").tolist()
        self._sums, self._real_tokens = None, 0
        return TokenMetrics(entropy / tokens, hits / tokens, int(real))

    def state(self) -> dict[str, Any]:
        """Returns this process's sums as JSON."""
        sums = None if self._sums is None else self._sums.tolist()
        return {"sums": sums, "real_tokens": self._real_tokens}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        sums, self._real_tokens = state["sums"], state["real_tokens"]
        self._sums = None if sums is None else torch.tensor(sums, device=self._device)


class TrainerSums:
    """The sums that transformers and trl keep since the last log, and leave out of checkpoints.

    transformers 5.23.0, trainer.py: `_inner_training_loop` sets the sums of the loss to zero. trl
    1.16.0, sft_trainer.py: `compute_loss` collects metrics in `_metrics`. Delete when TrainerState
    holds them.
    """

    def __init__(self, trainer: SFTTrainer) -> None:
        self._trainer = trainer

    def state(self) -> dict[str, Any]:
        """Returns this process's sums as JSON."""
        trainer = self._trainer
        return {
            "loss": trainer._tr_loss.item(),
            "total_loss": trainer._total_loss_scalar,
            "last_logged_step": trainer._globalstep_last_logged,
            "metrics": trainer._metrics["train"],
            "total_tokens": trainer._total_train_tokens,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`; call it after transformers has set its sums to zero."""
        trainer = self._trainer
        trainer._tr_loss = torch.tensor(state["loss"], device=trainer.args.device)
        trainer._total_loss_scalar = state["total_loss"]
        trainer._globalstep_last_logged = state["last_logged_step"]
        trainer._metrics["train"].update(state["metrics"])
        trainer._total_train_tokens = state["total_tokens"]
