"""Is a cell of a study better than the reference, and what could the study have found?"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t

from sftlab.comparison.study_file import Study
from sftlab.comparison.study_power import ALPHA, POWER, deviations, smallest_found
from sftlab.comparison.study_summary import LESS_IS_BETTER, task_scores
from sftlab.evaluation.significance import add_holm
from sftlab.tables import figure

# the least number of seeds that are tested
SEEDS_FOR_A_CLAIM = 3
UNTESTED, ALIKE = "untested", "not distinguishable"
# seeds that change nothing do not say how far another seed would
NO_SPREAD = "untested: no spread over seeds"


def claims(study: Study, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compare each cell with the reference in every score, over runs of equal seed.

    Returns the mean difference, its interval and a word: 'better', 'worse', 'not distinguishable'
    or, below three seeds and where seeds change nothing, 'untested'. The test is a paired t-test
    over seeds (Student 1908), with p-values after Holm over the cells of a score. An interval is
    adjusted like the p beside it: it holds 0 where that p is 0.05 or more.
    """
    found: list[dict[str, Any]] = []
    scores = LESS_IS_BETTER | dict.fromkeys(task_scores(study, rows), False)
    for score, less_is_better in scores.items():
        family = {}
        for cell in (cell for cell in study.cells if cell != study.reference):
            if pairs := _pairs(rows, study.reference, cell, score):
                about = {"cell": cell, "against": study.reference, "score": score}
                family[cell] = about | _paired_test(pairs)
        tested = {cell: one for cell, one in family.items() if one["p_value"] is not None}
        add_holm(tested)
        least = _smallest_found(list(tested.values()))
        for one in family.values():
            one |= {"least_found": least, "low": None, "high": None, "word": UNTESTED}
            if one["p_value"] is None:
                one["p_holm"] = None
                continue
            if not one["deviation"]:
                one["word"] = NO_SPREAD
                continue
            one["low"], one["high"] = _adjusted(one, len(tested))
            better = (one["difference"] < 0) == less_is_better
            one["word"] = ("better" if better else "worse") if one["p_holm"] < ALPHA else ALIKE
        found += family.values()
    order = {cell: place for place, cell in enumerate(study.cells)}
    return sorted(found, key=lambda one: order[one["cell"]])


def _pairs(
    rows: Sequence[Mapping[str, Any]], a: str, b: str, score: str
) -> list[tuple[float, float]]:
    """Returns the scores of two cells' runs of equal seed."""
    values: dict[str, dict[Any, float]] = {a: {}, b: {}}
    for row in rows:
        if row["cell"] in values and row["status"] == "succeeded" and row.get(score) is not None:
            values[row["cell"]][row["seed"]] = row[score]
    return [(values[a][seed], values[b][seed]) for seed in values[a] if seed in values[b]]


def _paired_test(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Returns the mean difference of pairs (reference, cell), its deviation and p-value."""
    differences = np.diff(np.array(pairs), axis=1)[:, 0]
    mean, seeds = float(differences.mean()), len(pairs)
    found = {"seeds": seeds, "difference": mean, "deviation": None, "p_value": None}
    if seeds < SEEDS_FOR_A_CLAIM:
        return found
    deviation = float(differences.std(ddof=1))
    if deviation <= 1e-12 * abs(mean) or not deviation:
        return found | {"deviation": 0.0, "p_value": 1.0}
    ratio = abs(mean) * math.sqrt(seeds) / deviation
    return found | {"deviation": deviation, "p_value": float(2 * t.sf(ratio, seeds - 1))}


def _adjusted(one: Mapping[str, Any], cells: int) -> tuple[float, float]:
    """Returns the interval of a difference at the level that Holm's correction leaves to it."""
    # a corrected p of 1 may have been cut there: then the level is that of the most cells
    share = one["p_value"] / one["p_holm"] if one["p_holm"] < 1 else 1 / cells
    reach = t.isf(ALPHA * share / 2, one["seeds"] - 1) * one["deviation"] / math.sqrt(one["seeds"])
    return one["difference"] - reach, one["difference"] + reach


def _smallest_found(tested: Sequence[Mapping[str, Any]]) -> float | None:
    """Returns the difference that a test of these cells finds in 80 % of studies, None unknown.

    It is of the root mean square of the deviations.
    """
    spread = deviations(tested)
    if not spread:
        return None
    (deviation,) = spread.values()
    return smallest_found(deviation, min(one["seeds"] for one in tested), len(tested))


def finding_lines(found: Sequence[Mapping[str, Any]], name: Callable[[str], str]) -> list[str]:
    """Returns what was found in each perplexity, a sentence each, in the order of the scores.

    `name` says what a score is called.
    """
    lines = []
    for score in (score for score in LESS_IS_BETTER if score.endswith("perplexity")):
        mine = [one for one in found if one["score"] == score]
        if not mine:
            continue
        said = "; ".join(_said(one) for one in mine)
        few, most = (f(one["seeds"] for one in mine) for f in (min, max))
        seeds = f"{few} to {most} seeds" if few < most else f"{few} seed{'s' * (few > 1)}"
        called = name(score)
        called = called[:1].upper() + called[1:]
        lines.append(f"{called}, against {mine[0]['against']} over {seeds}: {said}.")
    return lines


def most_apart(one: Mapping[str, Any]) -> str:
    """Returns how far from the reference a cell may be that is not distinguishable from it."""
    return f"at most {figure(max(-one['low'], one['high']))} apart"


def _said(one: Mapping[str, Any]) -> str:
    if one["low"] is None:
        return f"{one['cell']} {one['word']}"
    if one["word"] == ALIKE:
        return f"{one['cell']} {ALIKE}, {most_apart(one)}"
    low, high = sorted((abs(one["low"]), abs(one["high"])))
    by = f"{figure(abs(one['difference']))} [{figure(low)}, {figure(high)}]"
    return f"{one['cell']} {one['word']} by {by}"


def least_found_line(found: Sequence[Mapping[str, Any]], name: Callable[[str], str]) -> str:
    """Returns what the study could have found, in a sentence; empty where nothing was tested.

    `name` says what a score is called.
    """
    least = {one["score"]: one["least_found"] for one in found if one["least_found"] is not None}
    if not least:
        return ""
    said = ", ".join(f"{name(score)} {value:.3g}" for score, value in least.items())
    often = f"{100 * POWER:.0f} % of such studies"
    return f"A difference of this size would have been found in {often}: {said}."
