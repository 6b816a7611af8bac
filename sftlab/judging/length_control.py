"""Win rates and the length of answers:

who wins when longer, and what remains at equal length (alpaca-eval's model).
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from sftlab.evaluation.generation import Answer
from sftlab.evaluation.significance import FEW_ROWS
from sftlab.judging.pairwise import rate

# Resamples of rows for the interval: each is a fit of its own.
RESAMPLES = 200
# Rows won, or lost, below which a logistic model with one variable is not to be trusted (Peduzzi et
# al. 1996).
FEW_EVENTS = 10
# Inverse regularization. Cross-validated it can shrink the constant to nothing, and every rate to a
# half.
STRENGTH = 100.0
_MODEL = "length_controlled_minimal"


def mean_characters(answers: Sequence[Answer]) -> dict[str, float]:
    """The mean length of answers as AlpacaEval counts it."""
    return {"mean_characters": sum(len(answer.text) for answer in answers) / len(answers)}


def lengths(
    scores: Sequence[float | None], answers: Sequence[str], references: Sequence[str]
) -> dict[str, Any]:
    """The references' mean characters.

    How often an answer won that was longer, and that was shorter (ties: half).
    """
    answer, reference = (np.array([len(text) for text in texts]) for texts in (answers, references))
    won = np.array([np.nan if one is None else one for one in scores], dtype=float)
    found: dict[str, Any] = {"reference_characters": float(reference.mean())}
    for name, chosen in (("longer", answer > reference), ("shorter", answer < reference)):
        values = won[chosen & ~np.isnan(won)]
        found[name] = rate(int(values.sum()), len(values)) | {"pairs": len(values)}
        if len(values):
            found[name]["value"] = float(values.mean())
    return found


def length_controlled(
    scores: dict[str, Sequence[float | None]],
    answers: dict[str, Sequence[str]],
    references: Sequence[str],
    seed: int = 0,
) -> dict[str, Any] | None:
    """Win rates in per cent at equal length, by side, with 95 % intervals.

    And of two sides their difference.

    alpaca-eval's logistic model in the difference of lengths (Dubois et al. 2024, arXiv:2404.04475)
    without its terms for the difficulty of instructions, which were fitted to GPT-4: here it is
    fitted to the own judge's verdicts alone. Intervals by bootstrap over rows. None where the rows,
    or those won or lost, are too few to fit it.
    """
    known = [
        i for i in range(len(references)) if all(one[i] is not None for one in scores.values())
    ]
    differing = {
        side: len({len(answers[side][i]) - len(references[i]) for i in known}) > 1
        for side in scores
    }
    won = {side: sum(values[i] for i in known) for side, values in scores.items()}
    few = any(min(one, len(known) - one) < FEW_EVENTS for one in won.values())
    if len(known) < FEW_ROWS or few or not all(differing.values()):
        return None
    rng = np.random.default_rng(seed)
    draws = [rng.integers(len(known), size=len(known)) for _ in range(RESAMPLES)]
    found, drawn = {}, {}
    for side, values in scores.items():
        difference = np.array(
            [len(references[i]) - len(answers[side][i]) for i in known], dtype=float
        )
        table, equal = _design(np.array([values[i] for i in known]), difference)
        value = _fit(table, equal)
        drawn[side] = np.array([_fit(table.iloc[rows], equal) for rows in draws])
        found[side] = {
            "value": value,
            "interval_95": np.percentile(drawn[side], [2.5, 97.5]).tolist(),
        }
    if len(found) == 2:
        apart = drawn["tuned"] - drawn["base"]
        value = found["tuned"]["value"] - found["base"]["value"]
        found["difference"] = {
            "value": value,
            "interval_95": np.percentile(apart, [2.5, 97.5]).tolist(),
        }
    return found


def _design(scores: np.ndarray, difference: np.ndarray) -> tuple[Any, Any]:
    """The model's table of rows with their scores, and its one row of no difference in length."""
    import pandas

    glm = alpaca_metrics()
    lengths = {"std_delta_len": difference / difference.std(ddof=1), "preference": scores}
    rows = pandas.DataFrame(lengths).assign(not_gamed_baseline=True)
    equal = pandas.DataFrame({"std_delta_len": [0.0], "not_gamed_baseline": [True]})
    return glm.make_dmatrix_for_model(rows, equal, formula=glm.GLM_INFO[_MODEL]["formula"])


def _fit(table: Any, equal: Any) -> float:
    """The win rate at no difference in length, regularized as alpaca-eval's fits are by default."""
    seen = set(table["preference"])
    if seen in ({0.0}, {1.0}):  # a resample of one class: nothing to fit
        return 100 * seen.pop()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scikit-learn's coming changes
        model = alpaca_metrics().fit_LogisticRegressionCV(
            table, "preference", n_splits=0, C=STRENGTH
        )
    return 100 * float(model.predict_proba(equal)[0, 1])


def alpaca_metrics() -> Any:
    """alpaca-eval's module of the length-controlled win rate."""
    with quiet_alpaca():
        from alpaca_eval.metrics import glm_winrate
    return glm_winrate


@contextmanager
def quiet_alpaca() -> Iterator[None]:
    """Imported, alpaca-eval sets the root logger to INFO and warns of a deprecated module:

    neither is seen.
    """
    level = logging.getLogger().level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
        yield
    logging.getLogger().setLevel(level)
