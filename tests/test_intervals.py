"""Intervals of small samples that have not seen what is rare: they hold the truth all the same."""

import math

import numpy as np
import pytest

from sftlab.evaluation.intervals import rate_interval
from sftlab.evaluation.quality_warnings import few_row_warnings
from sftlab.evaluation.significance import Paired, compare, mean, perplexity, with_counts


def ratings(rng, rows):
    """One rating in twenty is 1, and all others are 9 or 10."""
    sides = (with_counts(rng.choice((1.0, 9.0, 10.0), rows, p=(0.05, 0.45, 0.5))) for _ in range(2))
    return Paired(mean, *sides, 1.0, 10.0)


def rare_wins(rng, rows):
    sides = (with_counts(100.0 * (rng.random(rows) < 0.005)) for _ in range(2))
    return Paired(mean, *sides, 0.0, 100.0)


def heavy_tails(rng, rows):
    shared, *own = rng.normal(size=(3, rows))
    sides = (np.exp(1.5 * (0.9 * shared + math.sqrt(0.19) * one)) for one in own)
    return Paired(perplexity, *map(with_counts, sides), 1.0, math.inf, True)


def rare_failures(rng, rows):
    """Nats next to 0, and one row in twenty is missed by 2 nats on average."""
    missed = (rng.random((2, rows)) < 0.05, rng.exponential(2, (2, rows)))
    sides = np.where(*missed, 0.01 * rng.random((2, rows)))
    return Paired(perplexity, *map(with_counts, sides), 1.0, math.inf, True)


def lengths(rng, rows):
    """Rows of unequal length. Where nats are high, the models are further apart."""
    tokens = np.ceil(np.exp(3 + 0.7 * rng.normal(size=rows)))
    shared, *own = rng.normal(size=(3, rows))
    nats = (
        share * np.exp(0.8 * shared + 0.6 * one - 0.5)
        for share, one in zip((1, 0.8), own, strict=True)
    )
    sides = (np.stack([one * tokens, tokens], axis=1) for one in nats)
    return Paired(perplexity, *sides, 1.0, math.inf, True)


@pytest.mark.parametrize(
    ("draw", "rows", "figure", "truth"),
    [
        (ratings, 20, "base", 9.1),
        (ratings, 30, "base", 9.1),
        (rare_wins, 30, "base", 0.5),
        (heavy_tails, 12, "base", math.exp(math.exp(1.125))),
        (heavy_tails, 20, "base", math.exp(math.exp(1.125))),
        (rare_failures, 10, "base", math.exp(0.1 + 0.95 * 0.005)),
        (rare_failures, 30, "base", math.exp(0.1 + 0.95 * 0.005)),
        (lengths, 15, "difference", math.exp(0.8) - math.e),
    ],
)
def test_what_was_not_seen_is_within_the_interval(draw, rows, figure, truth):
    """Bootstrap-t and Wilson's interval hold it in 59 to 92 % of such samples."""
    rng, held = np.random.default_rng(rows), []
    for trial in range(500):
        low, high = compare({"x": draw(rng, rows)}, 400, seed=trial)["x"][figure]["interval_95"]
        held.append(low <= truth <= (math.inf if high is None else high))
    assert np.mean(held) >= 0.925  # 95 % but for two deviations of 500 trials


def test_a_rate_of_one_in_thirty_may_be_far_rarer():
    assert rate_interval(1, 30)[0] == pytest.approx(-math.log(0.95) / 30)
    assert rate_interval(29, 30)[1] == pytest.approx(1 + math.log(0.95) / 30)
    assert rate_interval(0, 50) == pytest.approx([0, 0.0713], abs=1e-4)  # Wilson's
    assert rate_interval(12, 30) == pytest.approx([0.2459, 0.5768], abs=1e-4)
    won = with_counts(100.0 * (np.arange(30) < 1))
    found = compare({"x": Paired(mean, won, won, 0.0, 100.0)}, 100)["x"]["base"]["interval_95"]
    assert found == pytest.approx([100 * end for end in rate_interval(1, 30)], rel=1e-3)


def test_numbers_beyond_a_float_have_no_interval():
    nats = with_counts(np.array([1.0, 2.0, 900.0, 5000.0, 3.0]))
    with np.errstate(all="ignore"):
        found = compare({"x": Paired(perplexity, nats, nats, 1.0, math.inf, True)}, 100)["x"]
    assert found["difference"]["interval_95"] == [None, None]


def said_of(drawn):
    found = compare({"response_perplexity": drawn}, 100)
    return few_row_warnings(found, len(drawn.base), "rows")


def test_an_interval_that_may_be_too_narrow_has_its_warning_beside_it():
    """Ten rows of such nats are in the interval in 91 % of samples: it is said of all of them."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        wide, narrow = said_of(heavy_tails(rng, 10))
        assert wide == "fewer than 30 rows: the intervals are wide"
        assert narrow.startswith("response perplexity rests on about ")
        assert " of 10 rows: its interval may be too narrow, and about " in narrow
    said = [len(said_of(heavy_tails(rng, 805))) for _ in range(20)]
    assert sum(said) >= 12
    even = (with_counts(1 + 0.1 * rng.normal(size=805)) for _ in range(2))
    assert said_of(Paired(perplexity, *even, 1.0, math.inf, True)) == []


def test_the_warning_is_of_the_figure_that_rests_on_fewest_rows():
    """Three rows are hard for both models alike, so their difference rests on all the others."""
    rng = np.random.default_rng(0)
    hard = np.where(np.arange(200) < 3, 60.0, 0.0)
    sides = (with_counts(1 + 0.1 * rng.normal(size=200) + hard) for _ in range(2))
    (said,) = said_of(Paired(perplexity, *sides, 1.0, math.inf, True))
    assert said == (
        "response perplexity rests on about 3 of 200 rows: its interval may be too narrow, and "
        "about 968 rows would do"
    )
