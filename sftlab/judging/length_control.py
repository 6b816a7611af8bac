"""Win rates and the length of answers: by length, and at equal length by alpaca-eval's model."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from sftlab.evaluation.generation import Answer
from sftlab.evaluation.significance import FEW_ROWS
from sftlab.judging.pairwise import rate

# bootstrap resamples for the interval; each is fitted anew
RESAMPLES = 200
# A logistic model with one variable needs this many rows won, and as many lost (Peduzzi et al.
# 1996).
FEW_EVENTS = 10
# Inverse regularization strength. A cross-validated one can shrink the constant to 0 and every rate
# to a half.
STRENGTH = 100.0
# Least share of answers on either side of the reference's length.
EXTRAPOLATES = 0.05
_MODEL = "length_controlled_minimal"


def mean_characters(answers: Sequence[Answer]) -> dict[str, float]:
    """Returns the mean length of answers in characters, as AlpacaEval counts it."""
    return {"mean_characters": sum(len(answer.text) for answer in answers) / len(answers)}


def lengths(
    scores: Sequence[float | None], answers: Sequence[str], references: Sequence[str]
) -> dict[str, Any]:
    """Returns how often longer and shorter answers won. A tie counts half.

    The references' mean length in characters comes with it.
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
    """Returns win rates in per cent at equal length, by side, with 95 % bootstrap intervals.

    With two sides their difference comes too. The model is alpaca-eval's logistic one in the
    difference of lengths (Dubois et al. 2024, arXiv:2404.04475), fitted to this judge's verdicts
    alone. Its terms for the difficulty of instructions are left out, because they were fitted to
    GPT-4. Returns None where too few rows were won or lost for a fit.

    `rests_on` is the smaller number of answers: those as long as the reference's or longer, or
    those as long or shorter. Where they are less than 5 %, equal length is outside what was seen,
    and `value` is left out.
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
        rests_on = int(min((difference <= 0).sum(), (difference >= 0).sum()))
        found[side] = {"rests_on": rests_on, "rows": len(known)}
        if rests_on < max(FEW_EVENTS, EXTRAPOLATES * len(known)):
            continue
        table, equal = _design(np.array([values[i] for i in known]), difference)
        value = _fit(table, equal)
        drawn[side] = np.array([_fit(table.iloc[rows], equal) for rows in draws])
        found[side] |= {
            "value": value,
            "interval_95": np.percentile(drawn[side], [2.5, 97.5]).tolist(),
        }
    if len(drawn) == 2:
        apart = drawn["tuned"] - drawn["base"]
        value = found["tuned"]["value"] - found["base"]["value"]
        found["difference"] = {
            "value": value,
            "interval_95": np.percentile(apart, [2.5, 97.5]).tolist(),
        }
    return found


def _design(scores: np.ndarray, difference: np.ndarray) -> tuple[Any, Any]:
    """Returns the model's table of rows, and its one row of no difference in length."""
    import pandas

    glm = alpaca_metrics()
    lengths = {"std_delta_len": difference / difference.std(ddof=1), "preference": scores}
    rows = pandas.DataFrame(lengths).assign(not_gamed_baseline=True)
    equal = pandas.DataFrame({"std_delta_len": [0.0], "not_gamed_baseline": [True]})
    return glm.make_dmatrix_for_model(rows, equal, formula=glm.GLM_INFO[_MODEL]["formula"])


def _fit(table: Any, equal: Any) -> float:
    """Returns the win rate in per cent at no difference in length."""
    seen = set(table["preference"])
    if seen in ({0.0}, {1.0}):  # a resample of one class: nothing to fit
        return 100 * seen.pop()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about coming changes of scikit-learn
        model = alpaca_metrics().fit_LogisticRegressionCV(
            table, "preference", n_splits=0, C=STRENGTH
        )
    return 100 * float(model.predict_proba(equal)[0, 1])


def alpaca_metrics() -> Any:
    """Import alpaca-eval's module of the length-controlled win rate."""
    with quiet_alpaca():
        from alpaca_eval.metrics import glm_winrate
    return glm_winrate


@contextmanager
def quiet_alpaca() -> Iterator[None]:
    """Hide what alpaca-eval does when it is imported.

    It sets the root logger to INFO and warns about a deprecated module. Its fits warn about coming
    changes of scikit-learn.
    """
    level = logging.getLogger().level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
        warnings.filterwarnings("ignore", category=FutureWarning, module="sklearn")
        yield
    logging.getLogger().setLevel(level)
