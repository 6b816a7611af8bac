"""Negative log-likelihood of responses and whole texts, summed over tokens.

A trainer's `eval_loss` averages per-batch means, which depend on the batch size. Perplexity here is
exp(sum of negative log-likelihoods / number of tokens).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from sftlab.models.own_logits import own_log_probs_if_needed


class Likelihood(NamedTuple):
    """Summed negative log-likelihood in nats, and number of tokens, per row [rows, 2].

    `response` covers the response and its end token, `text` the whole text but its first token.
    """

    response: np.ndarray
    text: np.ndarray


def nats_per_token(parts: np.ndarray) -> float:
    """Returns nats per token over all rows of parts [rows, 2]."""
    return float(parts[:, 0].sum() / parts[:, 1].sum())


def with_fused_head(model: PreTrainedModel) -> PreTrainedModel:
    """Let `model(..., fused_lm_head=True)` return per-token log-probabilities.

    It never holds the logits of a whole batch, except where only the model's own logits are right.
    Returns the model.
    """
    add_fused_lm_head(model)
    own_log_probs_if_needed(model)
    return model


@torch.no_grad()
def likelihood(
    model: torch.nn.Module,
    batches: Iterable[dict[str, torch.Tensor]],
    gather: Callable[[Any], Any] = lambda x: x,
    names: Sequence[int] | None = None,
) -> Likelihood:
    """Score padded batches (`input_ids`, `attention_mask`, `labels`: [rows, tokens]).

    The model needs a fused head. `gather` collects the rows of all processes (accelerate's
    `gather_for_metrics`). Raises ValueError with the row's number (its name in `names`, if given)
    where the model gives no finite probability.
    """
    collected = []
    for batch in batches:
        real = batch["attention_mask"].bool()
        labels = batch["input_ids"].masked_fill(~real, -100)
        nll = -model(
            **batch | {"labels": labels}, use_cache=False, fused_lm_head=True
        ).log_probs.double()
        response = batch["labels"][:, 1:] != -100
        # not a product, because a NaN outside the response would spread into it
        in_response = torch.where(response, nll, 0.0).sum(dim=1)
        parts = [in_response, response.sum(dim=1), nll.sum(dim=1), real[:, 1:].sum(dim=1)]
        collected.append(gather(torch.stack([part.double() for part in parts], dim=1)))
    parts = torch.cat(collected).cpu().numpy()
    broken = np.flatnonzero(~np.isfinite(parts).all(axis=1))
    if len(broken):
        row = names[broken[0]] if names is not None else broken[0]
        raise ValueError(
            f"row {row}: the model gives no finite probability (NaN or infinite logits)"
        )
    return Likelihood(parts[:, :2], parts[:, 2:])


@torch.no_grad()
def nats_of_the_token_read(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Returns the mean nats at which the model predicts the token it has just read.

    A model trained on labels that were not shifted by one predicts what it reads. This is then
    lower than the nats of the next token. `batch` is padded.
    """
    real = batch["attention_mask"].bool()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    labels = batch["input_ids"].masked_fill(~real, -100)
    outputs = model(**inputs, shift_labels=labels, use_cache=False, fused_lm_head=True)
    return float(-outputs.log_probs.double().sum() / real.sum())
