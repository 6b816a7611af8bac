"""Paired comparisons: 95 % intervals, p-values by exchange, Holm's correction.

Every score is a function of sums over rows: a mean of (sum, count), perplexity of (nats, tokens),
BLEU of its ten n-gram counts. A resample is therefore one matrix product, and a corpus score is
resampled as a corpus score. sftlab/evaluation/intervals.py has the intervals.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest

from sftlab.evaluation.intervals import (
    Scale,
    effective_rows,
    gradient,
    interval,
    rate_interval,
    wilson,
)

# exchanges for a p-value, and resamples for an interval
RESAMPLES, INTERVAL_RESAMPLES = 10_000, 4_000
FEW_ROWS = 30
_CHUNK = 500
# the largest logarithm whose power is a number
_LARGEST = math.log(sys.float_info.max)


class Paired(NamedTuple):
    """One score of two models on the same rows.

    `base` and `tuned` are per-row parts [rows, k]. `score` maps their sums [..., k] to [...]. The
    score is from `low` to `high`. A `logarithmic` one is judged by its logarithm, in which a row
    counts parts[0] / parts[1].
    """

    score: Callable[[np.ndarray], np.ndarray]
    base: np.ndarray
    tuned: np.ndarray
    low: float = -math.inf
    high: float = math.inf
    logarithmic: bool = False


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
    clusters: Sequence[Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Returns each score's values, difference (tuned - base), 95 % intervals and p-value.

    Rows are drawn with replacement, the same ones for both models and for every score. Intervals
    are score intervals on a scale with ends, and bootstrap-t (sftlab/evaluation/intervals.py). An
    end that the rows cannot tell is None. The p-value of 'no difference' is two-sided, from
    exchanging the two models row by row (Noreen 1989). `clusters` [rows] names what belongs
    together, such as a conversation: its rows are drawn and exchanged together. `effective_rows`
    is of the figure that rests on fewest: base, tuned or difference. Raises ValueError where scores
    differ in their number of rows, or have none.
    """
    scores, kinds, sizes = _kinds_of_rows(scores, clusters)
    rng = np.random.default_rng(seed)
    by_chance = _exchange(kinds, sizes, resamples, rng)
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in scores}
    for counts in _draws(sizes, min(resamples, INTERVAL_RESAMPLES), rng):
        for name, one in kinds.items():
            drawn[name].append(_resampled(one, scores[name], counts))
    return {
        name: _estimates(one, np.concatenate(drawn[name], axis=-1)) | {"p_value": by_chance[name]}
        for name, one in scores.items()
    }


def p_values(
    scores: dict[str, Paired], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, float]:
    """Returns each score's p-value alone, as `compare` finds it."""
    _, kinds, sizes = _kinds_of_rows(scores, None)
    return _exchange(kinds, sizes, resamples, np.random.default_rng(seed))


def _kinds_of_rows(
    scores: dict[str, Paired], clusters: Sequence[Any] | None
) -> tuple[dict[str, Paired], dict[str, Paired], np.ndarray]:
    """Returns the scores by row or cluster, the same for each kind of row, and the kinds' sizes.

    Equal rows are drawn together: right and wrong answers make four kinds of rows at most.
    """
    scores = {name: _in_clusters(one, clusters) for name, one in scores.items()}
    rows = {len(part) for one in scores.values() for part in (one.base, one.tuned)}
    if len(rows) != 1:
        raise ValueError(f"paired scores need the same rows for both models, got {sorted(rows)}")
    if rows == {0}:
        raise ValueError("nothing to compare: no rows")
    everything = np.hstack([part for one in scores.values() for part in (one.base, one.tuned)])
    _, first, sizes = np.unique(everything, axis=0, return_index=True, return_counts=True)
    kinds = {
        name: one._replace(base=one.base[first], tuned=one.tuned[first])
        for name, one in scores.items()
    }
    return scores, kinds, sizes


def _exchange(
    kinds: dict[str, Paired], sizes: np.ndarray, resamples: int, rng: np.random.Generator
) -> dict[str, float]:
    """Returns each score's p-value from exchanging the models row by row."""
    apart: dict[str, list[np.ndarray]] = {name: [] for name in kinds}
    for chosen in _swaps(sizes, resamples, rng):
        for name, one in kinds.items():
            apart[name].append(_exchanged(one, sizes, chosen))
    return {name: _as_far(np.concatenate(found)) for name, found in apart.items()}


def _in_clusters(one: Paired, clusters: Sequence[Any] | None) -> Paired:
    """Returns a score with a row for each cluster, which has the sums of its rows."""
    base, tuned = np.asarray(one.base, float), np.asarray(one.tuned, float)
    if clusters is not None:
        if not len(clusters) == len(base) == len(tuned):
            raise ValueError(
                f"got {len(clusters)} names of clusters for {len(base)} and {len(tuned)} rows: "
                "expected one for each row"
            )
        known = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
        member = np.zeros((len(known), len(base)))
        member[[known[name] for name in clusters], np.arange(len(base))] = 1
        base, tuned = member @ base, member @ tuned
    return one._replace(base=base, tuned=tuned)


def _swaps(sizes: np.ndarray, resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Returns chunks [n, kinds] of how many rows of each kind are exchanged.

    These are all choices where they are few, else random ones. The first choice exchanges none.
    """
    kinds = len(sizes)
    if sizes.max() == 1 and 2**kinds <= resamples:
        yield np.arange(2**kinds)[:, None] >> np.arange(kinds) & 1
        return
    for start in range(0, resamples + 1, _CHUNK):
        shape = (min(_CHUNK, resamples + 1 - start), kinds)
        alone = sizes.max() == 1
        drawn = rng.integers(0, 2, shape) if alone else rng.binomial(sizes, 0.5, shape)
        drawn[0] *= start > 0
        yield drawn


def _draws(sizes: np.ndarray, resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Returns chunks [n, kinds] of how often each kind of row is drawn."""
    rows, kinds = int(sizes.sum()), len(sizes)
    kind_of_row = np.repeat(np.arange(kinds), sizes)
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        if kinds < rows / 4:
            yield rng.multinomial(rows, sizes / rows, size=size).astype(float)
            continue
        places = kind_of_row[rng.integers(0, rows, (size, rows))] + kinds * np.arange(size)[:, None]
        found = np.bincount(places.ravel(), minlength=size * kinds)
        yield found.reshape(size, kinds).astype(float)


def _exchanged(one: Paired, sizes: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Returns the differences [n] after exchanges `chosen` [n, kinds]."""
    moved = chosen @ (one.tuned - one.base)
    base, tuned = sizes @ one.base, sizes @ one.tuned
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.abs(one.score(tuned - moved) - one.score(base + moved))


def _as_far(differences: np.ndarray) -> float:
    """Returns the share of exchanges whose difference is at least that of the first, which is none.

    An exchange that leaves a side without a score counts as a difference by chance.
    """
    return float((~(differences < differences[0] * (1 - 1e-9))).mean())


def _judged(one: Paired, sums: np.ndarray) -> np.ndarray:
    """Returns the score of sums, or its logarithm."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(one.score(sums)) if one.logarithmic else one.score(sums)


def _weights(one: Paired) -> tuple[float, float]:
    """Returns what a difference of the judged scores counts, for base and tuned.

    A small difference of logarithms is one of the scores, times the score.
    """
    sides = (one.base, one.tuned)
    return tuple(float(one.score(x.sum(axis=0))) if one.logarithmic else 1.0 for x in sides)


def _resampled(kinds: Paired, whole: Paired, counts: np.ndarray) -> np.ndarray:
    """Returns base, tuned and difference of resamples, and their variances [2, 3, n].

    `counts` [n, kinds] says how often each kind of row is drawn. A variance is the sum of the
    squared influences of the rows, which are linear in a row's parts (infinitesimal jackknife).
    """
    values, influences = [], []
    for part in (kinds.base, kinds.tuned):
        sums = counts @ part
        values.append(_judged(whole, sums))
        slope = gradient(lambda moved: _judged(whole, moved), sums)
        influences.append(part @ slope.T)  # [kinds, n]
    base, tuned = _weights(whole)
    values.append(tuned * values[1] - base * values[0])
    influences.append(tuned * influences[1] - base * influences[0])
    variances = [np.einsum("nk,kn->n", counts, one**2) for one in influences]
    return np.array([values, variances])


def _estimates(one: Paired, drawn: np.ndarray) -> dict[str, Any]:
    """Returns both models' values and their difference, with intervals.

    `drawn` [2, 3, resamples] are the values and variances of base, tuned and difference.
    """
    sides, totals = (one.base, one.tuned), (one.base.sum(axis=0), one.tuned.sum(axis=0))
    value, weights = [float(one.score(total)) for total in totals], _weights(one)
    judged = [float(_judged(one, total)) for total in totals]
    influences = [
        part @ gradient(lambda sums: _judged(one, sums), total)
        for part, total in zip(sides, totals, strict=True)
    ]
    used = [(part != 0).any(axis=1) for part in sides]
    scale, apart = Scale(one.low, one.high, None), one.high - one.low
    if one.logarithmic:
        worst = max(float(mean(part[rows]).max()) for part, rows in zip(sides, used, strict=True))
        scale, apart = Scale(math.log(one.low), math.inf, worst), math.inf
    found: dict[str, Any] = {}
    rests = []
    for place, name in enumerate(("base", "tuned")):
        moved = influences[place][used[place]]
        rests.append(effective_rows(moved))
        ends = interval(judged[place], moved, drawn[:, place], scale)
        if one.logarithmic:
            ends = [None if end is None or end > _LARGEST else math.exp(end) for end in ends]
        found[name] = {"value": value[place], "interval_95": ends}
    moved = (weights[1] * influences[1] - weights[0] * influences[0])[used[0] | used[1]]
    center = weights[1] * judged[1] - weights[0] * judged[0]
    difference = value[1] - value[0]
    ends = interval(center, moved, drawn[:, 2], Scale(-apart, apart, None, paired=True), difference)
    found["difference"] = {"value": difference, "interval_95": ends}
    rests.append(effective_rows(moved))
    return found | {"effective_rows": round(min(filter(None, rests), default=0.0), 1)}


def method(what: str = "rows") -> str:
    """Returns in words how `compare` finds intervals and p-values."""
    return (
        f"intervals by bootstrap-t over {what} ({INTERVAL_RESAMPLES:,} resamples) and the score "
        "interval of the scale; p by exchanging the models' answers"
    )


def compare_rates(base: np.ndarray, tuned: np.ndarray) -> dict[str, Any]:
    """Returns what `compare` does, for answers [rows] that are right (1) or wrong (0).

    A bootstrap would claim certainty where all are right or all wrong. The intervals are those of
    `rate_interval`; for the paired difference Newcombe's hybrid of Wilson's (Statistics in Medicine
    17, 1998, pages 2635 to 2650, method 10). The p-value is McNemar's exact one (1947).
    """
    n = len(base)
    both, lost, won = (int(((base == b) & (tuned == t)).sum()) for b, t in ((1, 1), (1, 0), (0, 1)))
    neither = n - both - lost - won
    rates = {"base": (both + lost) / n, "tuned": (both + won) / n}
    right = {name: round(rate * n) for name, rate in rates.items()}
    limits = {name: wilson(count, n) for name, count in right.items()}
    found = {
        name: {"value": rates[name], "interval_95": rate_interval(count, n)}
        for name, count in right.items()
    }
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
