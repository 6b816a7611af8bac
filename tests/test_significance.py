"""Paired comparisons: exact where they must be, and as often wrong as they say."""

import math
import time

import numpy as np
import pytest

from sftlab.evaluation.significance import (
    Paired,
    add_holm,
    compare,
    compare_rates,
    mean,
    p_values,
    perplexity,
    with_counts,
)
from sftlab.evaluation.text_metrics import (
    Bleu,
    paired_scores,
    score_texts,
)

TEXT = (
    "the a cat dog sat ran on under mat tree and then slept quickly while rain fell over old quiet "
    "houses"
)
WORDS = TEXT.split()


def noisy_records(count, noise, seed=0):
    """Records of answers that keep each word of their reference with probability 1 - noise."""
    rng = np.random.default_rng(seed)
    references = [" ".join(rng.choice(WORDS, rng.integers(6, 25))) for _ in range(count)]
    answers = [
        " ".join(word if rng.random() > noise else rng.choice(WORDS) for word in text.split())
        for text in references
    ]
    scored = score_texts(answers, references, Bleu())
    for record, text in zip(scored, references, strict=True):
        tokens = len(text.split())
        record |= {
            "response_nll": [float(rng.gamma(2.0, 1.0) * tokens), tokens],
            "text_nll": [3.0 * tokens + rng.normal(), 2 * tokens],
        }
    return scored


def test_a_model_against_itself_differs_by_nothing():
    records = noisy_records(60, 0.3)
    for name, one in compare(paired_scores(records, records)).items():
        low, high = one["difference"]["interval_95"]
        # on a scale with ends another row may differ; nats are equal on every row by no chance
        reach = {"bleu": 6.1}.get(name, 0.061) * ("perplexity" not in name)
        assert one["difference"]["value"] == 0
        assert (low, high) == pytest.approx((-reach, reach), abs=0.02 * reach)
        assert one["p_value"] == 1.0
        assert one["base"] == one["tuned"]


def test_a_real_difference_is_found_and_has_the_right_sign():
    for name, one in compare(
        paired_scores(noisy_records(200, 0.6), noisy_records(200, 0.1))
    ).items():
        if name in ("bleu", "rouge1", "rouge2", "rougeL"):
            assert one["difference"]["interval_95"][0] > 0
            assert one["p_value"] < 0.01


@pytest.mark.long
def test_random_halves_of_the_same_outputs_are_significant_in_a_twentieth_of_trials():
    records, trials = np.array(noisy_records(400, 0.3)), 200
    significant = dict.fromkeys(paired_scores(records[:2], records[:2]), 0)
    for trial in range(trials):
        shuffled = np.random.default_rng(trial).permutation(records)
        for name, one in compare(
            paired_scores(shuffled[:200], shuffled[200:]), 400, seed=trial
        ).items():
            significant[name] += one["p_value"] < 0.05
    # a binomial of 200 trials at 5 % lies within 4 and 18 in 99 of 100 cases
    assert all(3 <= hits <= 18 for hits in significant.values()), significant


def test_intervals_cover_the_truth():
    covered = 0
    for trial in range(100):
        values = np.random.default_rng(trial).normal(2.0, 0.5, 200)
        one = compare(
            {"x": Paired(perplexity, with_counts(values), with_counts(values))}, 500, seed=trial
        )["x"]
        low, high = one["base"]["interval_95"]
        covered += low <= math.exp(2.0) <= high
    assert covered >= 88


@pytest.mark.parametrize("rows", [1, 4, 10, 20])
def test_few_rows_are_not_taken_for_more(rows):
    """The bootstrap alone calls one row certain, and ten equal models different in 9 %."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        base, tuned = (with_counts(rng.normal(size=rows)) for _ in range(2))
        found.append(compare({"x": Paired(mean, base, tuned)}, resamples=1000)["x"]["p_value"])
    assert np.mean(np.array(found) < 0.05) < 0.08
    better = compare(
        {"x": Paired(mean, with_counts(np.zeros(rows)), with_counts(np.arange(1.0, rows + 1)))}
    )["x"]
    assert better["p_value"] == pytest.approx(min(1, 2 / 2**rows), abs=2e-4)


POPULATIONS = {
    # nine in ten answers are perfect, one in fifty is none
    "near-perfect": ((1.0, 0.8, 0.5, 0.0), (0.9, 0.05, 0.03, 0.02), (0.0, 1.0)),
    "win rate near 0": ((0.0, 50.0, 100.0), (0.94, 0.02, 0.04), (0.0, 100.0)),
    "ratings": (range(1, 11), (0.02, 0, 0.02, 0.02, 0.02, 0.02, 0.05, 0.15, 0.3, 0.4), (1.0, 10.0)),
}


@pytest.mark.parametrize("rows", [10, 30])
@pytest.mark.parametrize("name", POPULATIONS)
def test_intervals_of_few_rows_hold_the_truth_as_often_as_they_say(name, rows):
    """The percentile bootstrap holds it in 33 to 90 % of such samples."""
    values, shares, scale = POPULATIONS[name]
    rng, truth, held = np.random.default_rng(1), np.dot(values, shares), []
    for trial in range(250):
        base, tuned = (with_counts(rng.choice(values, rows, p=shares)) for _ in range(2))
        found = compare({"x": Paired(mean, base, tuned, *scale)}, 400, seed=trial)["x"]
        for figure, value in (("base", truth), ("tuned", truth)):
            low, high = found[figure]["interval_95"]
            held.append(low - 1e-9 <= value <= high + 1e-9)
        low, high = found["difference"]["interval_95"]
        assert scale[0] - scale[1] <= low <= high <= scale[1] - scale[0]
    assert 0.93 <= np.mean(held) <= 0.985


def test_no_win_in_ten_of_either_model_says_little_about_their_difference():
    lost = with_counts(np.zeros(10))
    found = compare({"x": Paired(mean, lost, lost, 0.0, 100.0)})["x"]
    assert found["base"]["interval_95"] == pytest.approx([0, 27.75], abs=0.01)  # Wilson's
    assert found["difference"]["interval_95"] == pytest.approx([-27.75, 27.75], abs=0.01)
    won = with_counts(np.array([100.0] * 7 + [0.0] * 33))
    found = compare({"x": Paired(mean, with_counts(np.zeros(40)), won, 0.0, 100.0)})["x"]
    low, _ = found["difference"]["interval_95"]
    assert low < found["tuned"]["interval_95"][0]  # base's own interval reaches to 8.8
    assert found["base"]["interval_95"][1] == pytest.approx(8.76, abs=0.01)


@pytest.mark.parametrize("rows", [10, 30])
def test_exchange_is_not_too_sure_at_any_size(rows):
    rng, found = np.random.default_rng(0), []
    for trial in range(2_000):
        base, tuned = (with_counts(rng.lognormal(size=rows)) for _ in range(2))
        one = Paired(perplexity, base, tuned, 1.0, math.inf, True)
        found.append(p_values({"x": one}, 600, seed=trial)["x"])
    assert np.mean(np.array(found) < 0.05) <= 0.06  # 5 % and two deviations of 2,000 trials
    assert p_values({"x": one})["x"] == compare({"x": one})["x"]["p_value"]


def test_rows_of_one_conversation_are_drawn_together():
    rng = np.random.default_rng(0)
    shared, alarms = np.repeat(np.arange(20), 5), {True: 0, False: 0}
    for trial in range(150):
        difference = np.repeat(rng.normal(size=20), 5) + 0.2 * rng.normal(size=100)
        base, tuned = with_counts(np.zeros(100)), with_counts(difference)
        for together in alarms:
            clusters = shared.tolist() if together else None
            one = compare({"x": Paired(mean, base, tuned)}, 200, seed=trial, clusters=clusters)["x"]
            alarms[together] += one["p_value"] < 0.05
    assert alarms[True] <= 14  # of 150: 5 % within chance
    assert alarms[False] > 40
    with pytest.raises(ValueError, match="got 3 names of clusters for 100 and 100 rows"):
        compare({"x": Paired(mean, base, tuned)}, clusters=["a", "b", "c"])


def test_effective_rows_are_the_rows_that_decide():
    few = np.where(np.arange(100) < 5, 0.0, 1.0)
    one = compare({"x": Paired(mean, with_counts(np.ones(100)), with_counts(few))}, 100)["x"]
    assert 4 < one["effective_rows"] < 6


def test_pairing_is_used():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 10, 300)
    tuned = base + rng.normal(0.2, 0.1, 300)
    one = compare({"x": Paired(mean, with_counts(base), with_counts(tuned))})["x"]
    assert one["difference"]["interval_95"][0] > 0.18
    assert one["base"]["interval_95"][1] > one["tuned"]["interval_95"][0]


def test_repeated_rows_weigh_as_often_as_they_come():
    rng = np.random.default_rng(0)
    base, tuned = (rng.random((2, 14_042)) < np.array([[0.3], [0.32]])).astype(float)
    started = time.perf_counter()
    one = compare({"x": Paired(mean, with_counts(base), with_counts(tuned))})["x"]
    assert time.perf_counter() - started < 5
    for side, values in (("base", base), ("tuned", tuned), ("difference", tuned - base)):
        error = 1.96 * values.std() / math.sqrt(len(values))
        low, high = one[side]["interval_95"]
        assert one[side]["value"] == pytest.approx(values.mean())
        assert (low, high) == pytest.approx(
            (values.mean() - error, values.mean() + error), abs=0.1 * error
        )


def test_unequal_or_no_rows_are_refused():
    ones = with_counts(np.ones(3))
    with pytest.raises(ValueError, match="the same rows"):
        compare({"x": Paired(mean, ones, ones[:2])})
    with pytest.raises(ValueError, match="no rows"):
        compare({"x": Paired(mean, ones[:0], ones[:0])})


def test_holm_is_the_step_down_correction():
    found = {
        name: {"p_value": p} for name, p in {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.9}.items()
    }
    add_holm(found)
    assert {n: round(one["p_holm"], 6) for n, one in found.items()} == {
        "a": 0.04,
        "b": 0.09,
        "c": 0.09,
        "d": 0.9,
    }


def test_rates_are_compared_by_the_pairs_that_disagree():
    base, tuned = np.array([1, 1, 0, 0, 0, 0, 0, 0]), np.array([1, 0, 1, 1, 1, 1, 1, 1])
    one = compare_rates(base, tuned)
    assert one["p_value"] == pytest.approx(2 * (1 + 7) / 2**7)
    assert one["difference"]["value"] == pytest.approx((7 - 2) / 8)
    assert compare_rates(base, base)["p_value"] == 1
    assert compare_rates(base, base)["difference"]["value"] == 0


def test_newcombes_published_example():
    # Statistics in Medicine 17 (1998), table II, case (a): 36, 12, 2 and 0 of 50 pairs; method 10
    base = np.array([1] * 36 + [0] * 2 + [1] * 12)
    tuned = np.array([1] * 36 + [1] * 2 + [0] * 12)
    low, high = compare_rates(tuned, base)["difference"]["interval_95"]
    assert (low, high) == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_no_right_answer_in_fifty_is_not_taken_for_certainty():
    none = compare_rates(np.zeros(50), np.zeros(50))
    assert none["base"]["interval_95"] == pytest.approx([0, 0.0713], abs=1e-4)
    assert none["difference"]["interval_95"] == pytest.approx([-0.0713, 0.0713], abs=1e-4)
    assert none["p_value"] == 1


def test_the_interval_of_a_paired_difference_of_rates_covers_the_truth():
    rng, covered = np.random.default_rng(0), 0
    kinds = np.array([(1, 1), (1, 0), (0, 1), (0, 0)])
    for _ in range(400):
        base, tuned = kinds[rng.choice(4, 100, p=(0.5, 0.1, 0.2, 0.2))].T
        low, high = compare_rates(base, tuned)["difference"]["interval_95"]
        covered += low <= 0.1 <= high
    assert 370 <= covered <= 392


def test_rows_of_a_cluster_are_drawn_together():
    rng = np.random.default_rng(0)
    base, tuned = rng.random(40), rng.random(40) + 0.1
    clusters = np.repeat(np.arange(40), 5)
    once, five = (
        {"score": Paired(mean, with_counts(np.repeat(base, n)), with_counts(np.repeat(tuned, n)))}
        for n in (1, 5)
    )
    alone = compare(once)["score"]
    together = compare(five, clusters=clusters)["score"]
    for part in ("value", "interval_95"):
        assert together["difference"][part] == pytest.approx(alone["difference"][part])
    assert together["p_value"] == alone["p_value"]
    low, high = compare(five)["score"]["difference"]["interval_95"]
    assert high - low < 0.6 * np.ptp(together["difference"]["interval_95"])
