"""Paired comparisons: bootstrap intervals over rows, p-values, Holm's correction.

Every score is a function of sums over rows: a mean of (sum, count), perplexity of (nats, tokens),
BLEU of its ten n-gram counts. A resample is therefore one matrix product, and a corpus score is
resampled as a corpus score.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest

RESAMPLES = 10_000
FEW_ROWS = 30
_CHUNK = 500


class Paired(NamedTuple):
    """One score of two models on the same rows.

    `base` and `tuned` are per-row parts [rows, k]. `score` maps their sums [..., k] to [...].
    """

    score: Callable[[np.ndarray], np.ndarray]
    base: np.ndarray
    tuned: np.ndarray


def mean(sums: np.ndarray) -> np.ndarray:
    """Returns the mean of sums (value, count) [..., 2]."""
    return sums[..., 0] / sums[..., 1]


def perplexity(sums: np.ndarray) -> np.ndarray:
    """Returns the perplexity of sums (nats, tokens) [..., 2]: exp of nats per token."""
    return np.exp(mean(sums))


def with_counts(values: np.ndarray) -> np.ndarray:
    """Returns values [rows] as parts [rows, 2], whose `mean` is that of the values."""
    return np.stack([values, np.ones(len(values))], axis=1)


def compare(
    scores: dict[str, Paired],
    resamples: int = RESAMPLES,
    seed: int = 0,
    clusters: Sequence[int] | None = None,
) -> dict[str, dict[str, Any]]:
    """Returns each score's values, difference (tuned - base), 95 % intervals and p-value.

    Rows are drawn with replacement, the same ones for both models and for every score (paired
    percentile bootstrap; Efron and Tibshirani 1993, chapter 13). `clusters` says which rows are
    drawn together, such as the turns of a conversation (Davison and Hinkley 1997, section 3.8). The
    p-value of 'no difference' is two-sided and counts the observed sample (equation 4.11 there).
    Below FEW_ROWS rows a bootstrap is too sure; p then comes from exchanging the two models row by
    row (Noreen 1989). Raises ValueError where scores differ in their number of rows, or have none.
    """
    parts = {
        name: (np.asarray(s.base, float), np.asarray(s.tuned, float)) for name, s in scores.items()
    }
    rows = {len(part) for pair in parts.values() for part in pair}
    if len(rows) != 1:
        raise ValueError(f"paired scores need the same rows for both models, got {sorted(rows)}")
    count = rows.pop()
    if count == 0:
        raise ValueError("nothing to compare: no rows")
    if clusters is not None:
        parts = {name: tuple(_summed(p, clusters) for p in pair) for name, pair in parts.items()}
        count = len(np.unique(clusters))
    # equal rows are drawn together: right and wrong answers make four kinds of rows at most
    everything = np.hstack([part for pair in parts.values() for part in pair])
    _, first, sizes = np.unique(everything, axis=0, return_index=True, return_counts=True)
    drawn = {name: np.empty((2, resamples)) for name in scores}
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, _CHUNK):
        chunk = slice(start, min(start + _CHUNK, resamples))
        counts = rng.multinomial(count, sizes / count, size=chunk.stop - start).astype(float)
        for name, pair in parts.items():
            for side in (0, 1):
                drawn[name][side, chunk] = scores[name].score(counts @ pair[side][first])
    found = {
        name: _summary([float(scores[name].score(part.sum(axis=0))) for part in pair], drawn[name])
        for name, pair in parts.items()
    }
    if count < FEW_ROWS:
        swaps = _swaps(count, resamples, rng)
        for name, pair in parts.items():
            found[name]["p_value"] = _exchanged(scores[name].score, *pair, swaps)
    return found


def _summed(part: np.ndarray, clusters: Sequence[int]) -> np.ndarray:
    """Returns the sums [clusters, k] of a score's parts [rows, k]."""
    names, place = np.unique(clusters, return_inverse=True)
    sums = np.zeros((len(names), part.shape[1]))
    np.add.at(sums, place, part)
    return sums


def _swaps(rows: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Returns which rows are exchanged [n, rows]: all choices where they are few, else random ones.

    The first choice exchanges none.
    """
    if 2**rows <= resamples:
        return (np.arange(2**rows)[:, None] >> np.arange(rows)) & 1
    return np.vstack(
        [np.zeros((1, rows), dtype=np.int64), rng.integers(0, 2, size=(resamples, rows))]
    )


def _exchanged(
    score: Callable[[np.ndarray], np.ndarray],
    base: np.ndarray,
    tuned: np.ndarray,
    swaps: np.ndarray,
) -> float:
    """Returns the share of exchanges whose difference is at least the observed one."""
    moved = swaps @ (tuned - base)
    with np.errstate(divide="ignore", invalid="ignore"):
        differences = np.abs(score(tuned.sum(axis=0) - moved) - score(base.sum(axis=0) + moved))
    # an exchange that leaves a side without a score counts as a difference by chance
    return float((~(differences < differences[0] * (1 - 1e-9))).mean())


def method(count: int, what: str = "rows") -> str:
    """Returns in words how `compare` finds intervals and p-values for `count` rows."""
    few = (
        f" (p: by exchanging the models' answers, as {what} are fewer than {FEW_ROWS})"
        if count < FEW_ROWS
        else ""
    )
    return f"paired bootstrap over {what}, {RESAMPLES} resamples{few}"


def _summary(values: list[float], drawn: np.ndarray) -> dict[str, Any]:
    differences = drawn[1] - drawn[0]
    beyond = min((differences <= 0).sum(), (differences >= 0).sum())
    return {
        "base": _with_interval(values[0], drawn[0]),
        "tuned": _with_interval(values[1], drawn[1]),
        "difference": _with_interval(values[1] - values[0], differences),
        "p_value": min(1.0, float(2 * (beyond + 1) / (len(differences) + 1))),
    }


def _with_interval(value: float, drawn: np.ndarray) -> dict[str, Any]:
    return {"value": value, "interval_95": np.percentile(drawn, [2.5, 97.5]).tolist()}


def compare_rates(base: np.ndarray, tuned: np.ndarray) -> dict[str, Any]:
    """Returns what `compare` does, for answers [rows] that are right (1) or wrong (0).

    A bootstrap would claim certainty where all are right or all wrong. The intervals are Wilson's
    (1927), for the paired difference Newcombe's hybrid of them (Statistics in Medicine 17, 1998,
    pages 2635 to 2650, method 10). The p-value is McNemar's exact one (1947).
    """
    n = len(base)
    both, lost, won = (int(((base == b) & (tuned == t)).sum()) for b, t in ((1, 1), (1, 0), (0, 1)))
    neither = n - both - lost - won
    rates = {"base": (both + lost) / n, "tuned": (both + won) / n}
    limits = {
        name: binomtest(round(rate * n), n).proportion_ci(method="wilson")
        for name, rate in rates.items()
    }
    found = {name: {"value": rates[name], "interval_95": list(limits[name])} for name in rates}
    margins = math.prod((both + lost, won + neither, both + won, lost + neither))
    agreement = both * neither - won * lost
    if agreement > 0:
        agreement = max(agreement - n / 2, 0.0)
    phi = agreement / math.sqrt(margins) if margins else 0.0
    below, above = (
        {name: abs(limits[name][end] - rates[name]) for name in rates} for end in (0, 1)
    )

    def reach(tuned_side: float, base_side: float) -> float:
        return math.sqrt(max(tuned_side**2 - 2 * phi * tuned_side * base_side + base_side**2, 0.0))

    difference = (won - lost) / n
    low, high = (
        difference - reach(below["tuned"], above["base"]),
        difference + reach(above["tuned"], below["base"]),
    )
    found["difference"] = {"value": difference, "interval_95": [low, high]}
    found["p_value"] = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    return found


def add_holm(comparisons: dict[str, dict[str, Any]]) -> None:
    """Add `p_holm` to each comparison: its p-value corrected for their number (Holm 1979)."""
    ordered = sorted(comparisons.values(), key=lambda one: one["p_value"])
    largest = 0.0
    for position, one in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - position) * one["p_value"]))
        one["p_holm"] = largest
