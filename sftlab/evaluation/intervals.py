"""95 % intervals of scores of few rows: bootstrap-t, and a score interval on a bounded scale.

benchmarks/coverage.py measures how often they hold the truth (results/coverage).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest, chi2, norm

Score = Callable[[np.ndarray], np.ndarray]
Interval = list[float | None]

# Below as many effective rows, a resample seldom holds the rows that matter.
FEW_EFFECTIVE = 15
_Z2 = float(norm.ppf(0.975)) ** 2
_STEP = 1e-5
# a resample whose variance is smaller than this share of the sample's has no variance
_NOTHING = 1e-12
# the error of a derivative: what a row moves the score, times the rows, as a share of the score
_ROUNDING = 1e-4
# How far an unseen row may be from the mean, in the distances of the worst row seen: of nats, and
# of a difference. An unseen row costs a nat a token at least.
_UNSEEN, _UNSEEN_APART, _UNSEEN_NATS = 3.5, 2.0, 1.0


def gradient(score: Score, sums: np.ndarray) -> np.ndarray:
    """Returns the derivatives [..., k] of a score by its sums [..., k]; 0 where a sum is 0."""
    found = np.zeros_like(sums)
    for place in range(sums.shape[-1]):
        ends = []
        for factor in (1 + _STEP, 1 - _STEP):
            moved = sums.copy()
            moved[..., place] *= factor
            ends.append(score(moved))
        width = 2 * _STEP * sums[..., place]
        known = width != 0
        found[..., place] = np.where(known, (ends[0] - ends[1]) / np.where(known, width, 1), 0)
    return found


def effective_rows(influence: np.ndarray) -> float:
    """Returns on how many rows a score's variance rests: (sum of squares)^2 / sum of 4th powers.

    `influence` [rows] is what each row moves the score. Normal rows count a third; where few rows
    of many differ from the others, it is about their number. Returns 0 where none differs.
    """
    squares = (influence - influence.mean()) ** 2
    return float(squares.sum() ** 2 / (squares**2).sum()) if squares.any() else 0.0


def bootstrap_t(
    value: float, variance: float, drawn: np.ndarray, variances: np.ndarray
) -> tuple[float, float]:
    """Returns the bootstrap-t interval (Efron and Tibshirani 1993, section 12.5).

    `drawn` and `variances` [resamples] are the score and its estimated variance in each resample.
    An end is infinite where too many resamples have no variance.
    """
    moved = drawn - value
    moved[np.abs(moved) <= 1e-9 * max(abs(value), _NOTHING)] = 0
    spread = np.sqrt(np.where(variances > _NOTHING * variance, variances, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(moved == 0, 0.0, moved / spread)
    ratios.sort()
    place = max(math.floor(0.025 * (len(ratios) + 1)) - 1, 0)
    error = math.sqrt(variance)
    return value - ratios[-1 - place] * error, value - ratios[place] * error


def score_interval(values: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Returns the score interval of the mean of `values` [rows] on a scale from `low` to `high`.

    A mean is in the interval where it is within 1.96 standard errors of the observed one, at the
    row probabilities of the largest likelihood for that mean (as Miettinen and Nurminen 1985). The
    probabilities are of the observed values and of the scale's ends (empirical likelihood, Owen
    1988). For right and wrong answers it is `rate_interval`. An infinite end of the scale gives an
    infinite end of the interval.
    """
    low, high = min(low, values.min()), max(high, values.max())
    ends = [-math.inf, math.inf]
    if math.isfinite(low):
        ends[0] = low + _lower_limit(values - low)
    if math.isfinite(high):
        ends[1] = high - _lower_limit(high - values)
    return ends[0], ends[1]


def _lower_limit(values: np.ndarray) -> float:
    """Returns the least mean that the score test accepts, of values from 0 on.

    The likeliest probabilities for a lower mean are proportional to 1 / (1 + t * value). Behind
    the harmonic mean of the values they also give the value 0 a share, and the end is explicit.
    """
    mean, rows = values.mean(), len(values)
    if mean <= 0:
        return 0.0
    away = values[values > 1e-3 * values.max()]
    most = float(away.mean()) * _rare_limit(len(away), rows)
    harmonic = rows / (1 / values).sum() if values.min() > 0 else 0.0
    explicit = mean / (1 + _Z2 / rows)
    if explicit <= harmonic:
        return min(float(explicit), most)

    def tilted(exponent: float) -> tuple[float, float]:
        weights = 1 / (1 + math.exp(exponent) / mean * values)
        weights /= weights.sum()
        lower = float(weights @ values)
        variance = float(weights @ values**2) - lower**2
        return lower, rows * (mean - lower) ** 2 - _Z2 * variance

    exponent = brentq(lambda one: tilted(one)[1], -25.0, 50.0, xtol=1e-9)
    return min(tilted(exponent)[0], most)


def _rare_limit(count: int, rows: int) -> float:
    """Returns the least share of rows of which `count` may be seen, infinite where it is not rare.

    With one to three of a kind Wilson's limit is too high, and the Poisson distribution's is taken
    (Brown, Cai and DasGupta 2001, section 4.1.1).
    """
    rare = 0 < count <= (2 if rows <= 50 else 3) and 2 * count <= rows
    return float(chi2.ppf(0.05, 2 * count)) / 2 / rows if rare else math.inf


def wilson(count: int, rows: int) -> tuple[float, float]:
    """Returns Wilson's score interval (1927) of `count` of `rows`."""
    low, high = binomtest(count, rows).proportion_ci(method="wilson")
    return float(low), float(high)


def rate_interval(count: int, rows: int) -> list[float]:
    """Returns the interval of `count` of `rows`: Wilson's, corrected next to 0 and 1."""
    low, high = wilson(count, rows)
    return [min(low, _rare_limit(count, rows)), max(high, 1 - _rare_limit(rows - count, rows))]


class Scale(NamedTuple):
    """From where to where a statistic goes, and the value of its worst row where it has no end.

    `paired` says that it is a difference of two models on the same rows, most of which are alike.
    """

    low: float
    high: float
    worst: float | None
    paired: bool = False


def interval(
    center: float,
    influence: np.ndarray,
    drawn: np.ndarray,
    scale: Scale,
    value: float | None = None,
) -> Interval:
    """Returns a statistic's 95 % interval around `value`, by default `center`.

    `influence` [rows] is what each row moves the statistic, whose own value is `center`. `drawn`
    [2, resamples] are its value and variance in each resample. On a scale with two ends it is the
    score interval, and with enough effective rows the wider of it and bootstrap-t, or bootstrap-t
    alone of a paired difference. Without such ends it is bootstrap-t; with few effective rows it is
    widened by the score interval up to the worst row that may be unseen. An end that remains
    infinite is None.
    """
    if not (math.isfinite(center) and np.isfinite(influence).all()):  # beyond a float's numbers
        return [None, None]
    shift = 0.0 if value is None else value - center
    rounded = len(influence) * np.abs(influence) <= _ROUNDING * abs(center)
    influence = np.where(rounded, 0.0, influence)
    known = np.isfinite(drawn).all(axis=0)
    if not known.any():
        return [None, None]
    variance = float(influence @ influence)
    low, high = (end + shift for end in bootstrap_t(center, variance, *drawn[:, known]))
    value, values = center + shift, center + shift + len(influence) * influence
    few = effective_rows(influence) < FEW_EFFECTIVE
    if math.isfinite(scale.low) and math.isfinite(scale.high):
        if few or not scale.paired:
            least, most = score_interval(values, scale.low, scale.high)
            low, high = (least, most) if few else (min(low, least), max(high, most))
    elif scale.worst is not None:
        unseen = max(scale.worst, value + _UNSEEN * (values.max() - value)) if few else -math.inf
        least, most = score_interval(values, scale.low, max(unseen, _UNSEEN_NATS))
        low = low if math.isfinite(low) and variance else least
        high = max(high, most) if math.isfinite(high) else most
    elif few and variance:
        ends = (value + _UNSEEN_APART * (end - value) for end in (values.min(), values.max()))
        least, most = score_interval(values, *ends)
        low, high = min(low, least), max(high, most)
    low, high = max(low, scale.low), min(high, scale.high)
    return [float(end) if math.isfinite(end) else None for end in (low, high)]
