"""Negative log-likelihood of responses: summed over tokens, never averaged over batches.

`eval_loss` of a trainer averages per-batch means, which depends on the batch size; perplexity here is
exp(sum of negative log-likelihoods / number of response tokens), with intervals that resample rows.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head


class RowNll(NamedTuple):
    """Per row: summed negative log-likelihood of its response tokens in nats, and their number."""

    nll: np.ndarray
    tokens: np.ndarray

    @property
    def mean(self) -> float:
        """Nats a response token, over the corpus."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """exp of `mean`."""
        return float(np.exp(self.mean))


def with_fused_head(model: PreTrainedModel) -> PreTrainedModel:
    """Let `model(..., fused_lm_head=True)` return per-token log-probabilities without whole-batch logits."""
    add_fused_lm_head(model)
    return model


@torch.no_grad()
def row_nll(
    model: torch.nn.Module, batches: Iterable[dict[str, torch.Tensor]], gather: Callable[[Any], Any] = lambda x: x
) -> RowNll:
    """Score padded batches (`input_ids`, `attention_mask`, `labels`: [rows, tokens]) with a fused-head model.

    `gather` brings the rows of all processes together (accelerate's `gather_for_metrics`). Raises ValueError that
    names the row where the model gives no finite probability.
    """
    nll, tokens = [], []
    for batch in batches:
        outputs = model(**batch, use_cache=False, fused_lm_head=True)
        nll.append(gather(-outputs.log_probs.float().sum(dim=1)))
        tokens.append(gather(outputs.label_mask.sum(dim=1)))
    scores = RowNll(torch.cat(nll).double().cpu().numpy(), torch.cat(tokens).cpu().numpy())
    broken = np.flatnonzero(~np.isfinite(scores.nll))
    if len(broken):
        raise ValueError(
            f"row {broken[0]} has a loss of {scores.nll[broken[0]]}: the model gives no finite probability"
        )
    return scores


def bootstrap_perplexity(
    scores: list[RowNll], resamples: int = 10_000, seed: int = 0
) -> tuple[list[tuple[float, float]], np.ndarray]:
    """95 % percentile intervals of each model's perplexity, and the resampled perplexities [models, resamples].

    Rows are drawn with replacement, the same ones for every model (paired bootstrap; Efron and Tibshirani 1993,
    chapter 13).
    """
    rows = len(scores[0].nll)
    rng = np.random.default_rng(seed)
    sums = np.empty((len(scores), resamples))
    for start in range(0, resamples, 500):
        drawn = rng.multinomial(rows, np.full(rows, 1 / rows), size=min(500, resamples - start))
        for index, score in enumerate(scores):
            sums[index, start : start + len(drawn)] = (drawn @ score.nll) / (drawn @ score.tokens)
    perplexities = np.exp(sums)
    low, high = np.percentile(perplexities, [2.5, 97.5], axis=1)
    return list(zip(low.tolist(), high.tolist(), strict=True)), perplexities
