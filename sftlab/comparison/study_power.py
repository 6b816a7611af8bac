"""How many seeds and rows does a study need to see a difference of a given size?

A study sees a difference where its paired t-test finds it in 80 % of such studies, after Holm over
the cells that are compared.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scipy.optimize import brentq
from scipy.stats import nct, norm, t

from sftlab.tables import figure

ALPHA, POWER = 0.05, 0.8
SHOWN_SEEDS = (3, 4, 5, 6, 8, 10, 15, 20)
MOST_SEEDS = 1_000

Table = list[list[str]]


def smallest_found(deviation: float, seeds: int, cells: int) -> float:
    """Returns the difference that is found in 80 % of studies.

    `deviation` is that of a difference between seeds. It is of the first step of Holm's correction
    over `cells` comparisons.
    """
    edge = t.isf(ALPHA / cells / 2, seeds - 1)

    def lacks(shift: float) -> float:
        return POWER - nct.sf(edge, seeds - 1, shift)

    return float(brentq(lacks, 0.0, 10 * edge)) * deviation / math.sqrt(seeds)


def seeds_needed(difference: float, deviation: float, cells: int) -> int | None:
    """Returns how many seeds find a difference in 80 % of studies, None beyond 1,000."""
    found = (n for n in range(3, MOST_SEEDS) if smallest_found(deviation, n, cells) <= difference)
    return next(found, None)


def rows_needed(difference: float, rows: int, half_width: float) -> int:
    """Returns how many test rows find a difference of two runs in 80 % of cases.

    `half_width` is that of the 95 % interval of one run's score over `rows` rows. Answers to the
    same rows mostly agree, so that fewer rows may do.
    """
    error = half_width / norm.isf(0.025) * math.sqrt(2)
    return math.ceil(rows * ((norm.isf(0.025) + norm.isf(1 - POWER)) * error / difference) ** 2)


def deviations(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns by score the deviation of differences between seeds: of claims, their mean square."""
    by_score: dict[str, list[float]] = {}
    for one in found:
        if one["deviation"]:
            by_score.setdefault(one["score"], []).append(one["deviation"])
    return {
        score: math.sqrt(sum(x**2 for x in every) / len(every)) for score, every in by_score.items()
    }


def power_table(spread: Mapping[str, float], cells: int, name: Callable[[str], str]) -> Table:
    """Returns a heading, and a row a number of seeds with the smallest difference in each score."""
    table = [["seeds", *(name(score) for score in spread)]]
    for seeds in SHOWN_SEEDS:
        least = (smallest_found(deviation, seeds, cells) for deviation in spread.values())
        table.append([str(seeds), *map(figure, least)])
    return table
