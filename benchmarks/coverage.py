"""How often do 95 % intervals hold the truth, and how often is p below 0.05 where nothing differs?

python benchmarks/coverage.py --records runs/demo-attn_r16/eval/quality.jsonl
    [--trials 500] [--alarm_trials 20000] [--out results/coverage]

Rows are drawn from a population whose scores are known: the demo's own held-out rows, row nats with
heavy tails, win rates near 0, ratings of a category. Each trial is compared as eval/ compares. The
percentile bootstrap, which was used before, is measured on the same trials. False alarms are
counted in trials of their own, since p-values take little time.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sftlab.evaluation.significance import (
    Paired,
    compare,
    mean,
    p_values,
    perplexity,
    with_counts,
)
from sftlab.evaluation.text_metrics import paired_scores
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.runs.environment import provenance
from sftlab.script_options import Options
from sftlab.tables import aligned, write_csv

RESAMPLES = 1_000
SIZES = (10, 30, 100)
# ratings from 1 to 10 of a strong model, of one that seldom fails, and of a middling one
STRONG = (0.02, 0, 0.02, 0.02, 0.02, 0.02, 0.05, 0.15, 0.3, 0.4)
RARE_FAILURES = (0.05, 0, 0, 0, 0, 0, 0, 0, 0.45, 0.5)
MIDDLING = (0.02, 0.03, 0.05, 0.08, 0.1, 0.15, 0.2, 0.2, 0.12, 0.05)


class Case(NamedTuple):
    """A population: `draw` gives its rows' scores, `truth` base, tuned and difference of each."""

    name: str
    draw: Callable[[np.random.Generator, int], dict[str, Paired]]
    truth: dict[str, dict[str, float]]


def main() -> None:
    """Simulate every case at every size, write the table, print it."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, help="RUN/eval/quality.jsonl of the demo")
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--alarm_trials", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=Path("results/coverage"))
    arguments = parser.parse_args()
    lines = []
    arguments.out.mkdir(parents=True, exist_ok=True)
    for case in cases(arguments.records):
        for rows in (*SIZES, *([805] if case.name.startswith("lognormal") else [])):
            trials = arguments.trials if rows < 500 else arguments.trials // 4
            alarms = false_alarms(case, rows, arguments.alarm_trials * trials // arguments.trials)
            lines += simulate(case, rows, trials, alarms)
            about = provenance()
            write_csv(arguments.out / "coverage.csv", [line | about for line in lines])
            print(aligned([list(map(str, line.values())) for line in lines[-3:]]), flush=True)


def cases(records: Path | None) -> Iterator[Case]:
    """Returns the populations."""
    if records:
        yield demo([json.loads(line) for line in records.read_text().splitlines()])
    for sigma in (1.0, 1.5):
        yield heavy_tails(sigma)
    for rate in (0.004, 0.02, 0.1):
        yield win_rates(rate)
    known = {"strong": STRONG, "rare failures": RARE_FAILURES, "middling": MIDDLING}
    for name, shares in known.items():
        yield ratings(name, shares)


def demo(records: list[dict[str, Any]]) -> Case:
    """Returns the demo's rows: near-perfect answers of tuned, poor ones of base."""
    sides = {side: [record[side] for record in records] for side in ("base", "tuned")}
    every = paired_scores(sides["base"], sides["tuned"])

    def draw(rng: np.random.Generator, rows: int) -> dict[str, Paired]:
        chosen = rng.integers(len(records), size=rows)
        return {
            name: one._replace(base=one.base[chosen], tuned=one.tuned[chosen])
            for name, one in every.items()
        }

    truth = {}
    for name, one in every.items():
        base, tuned = (float(one.score(part.sum(axis=0))) for part in (one.base, one.tuned))
        truth[name] = {"base": base, "tuned": tuned, "difference": tuned - base}
    return Case("demo rows", draw, truth)


def heavy_tails(sigma: float) -> Case:
    """Returns two equal models whose nats of a row are lognormal, and correlate."""
    value = math.exp(math.exp(sigma**2 / 2))

    def draw(rng: np.random.Generator, rows: int) -> dict[str, Paired]:
        shared, *own = rng.normal(size=(3, rows))
        sides = (np.exp(sigma * (0.9 * shared + math.sqrt(0.19) * one)) for one in own)
        return {"perplexity": Paired(perplexity, *map(with_counts, sides), 1.0, math.inf, True)}

    truth = {"base": value, "tuned": value, "difference": 0.0}
    return Case(f"lognormal nats, sigma {sigma:g}", draw, {"perplexity": truth})


def win_rates(rate: float) -> Case:
    """Returns a base that wins in `rate` of the rows, and a tuned that wins in twice as many."""

    def wins(rng: np.random.Generator, rows: int, share: float) -> np.ndarray:
        return with_counts(
            rng.choice((0, 50.0, 100.0), rows, p=(1 - 1.5 * share, share / 2, share))
        )

    def draw(rng: np.random.Generator, rows: int) -> dict[str, Paired]:
        sides = (wins(rng, rows, share) for share in (rate, 2 * rate))
        return {"win rate": Paired(mean, *sides, 0.0, 100.0)}

    base = 125 * rate
    truth = {"base": base, "tuned": 2 * base, "difference": base}
    return Case(f"win rates, {base:g} and {2 * base:g} %", draw, {"win rate": truth})


def ratings(name: str, shares: tuple[float, ...]) -> Case:
    """Returns two equal models whose ratings have these shares."""
    scale = np.arange(1, 11.0)

    def draw(rng: np.random.Generator, rows: int) -> dict[str, Paired]:
        sides = (with_counts(rng.choice(scale, rows, p=shares)) for _ in range(2))
        return {"rating": Paired(mean, *sides, 1.0, 10.0)}

    value = float(scale @ shares)
    truth = {"base": value, "tuned": value, "difference": 0.0}
    return Case(f"ratings, {name}", draw, {"rating": truth})


def false_alarms(case: Case, rows: int, trials: int) -> dict[str, float]:
    """Returns how often p is below 0.05, for each score in which the models do not differ."""
    equal = [score for score, truth in case.truth.items() if truth["difference"] == 0]
    if not equal:
        return {}
    rng = np.random.default_rng([rows, 1])
    below = dict.fromkeys(equal, 0)
    for trial in range(trials):
        found = p_values(case.draw(rng, rows), RESAMPLES, seed=trial)
        for score in equal:
            below[score] += found[score] < 0.05
    return {score: count / trials for score, count in below.items()}


def simulate(case: Case, rows: int, trials: int, alarms: dict[str, float]) -> list[dict[str, Any]]:
    """Returns a line for each score and figure: coverage, width, false alarms."""
    rng = np.random.default_rng(rows)
    held: dict[tuple[str, str], list[tuple[bool, bool, float]]] = {}
    for trial in range(trials):
        drawn = case.draw(rng, rows)
        found = compare(drawn, RESAMPLES, seed=trial)
        for score, truth in case.truth.items():
            if score not in found:
                continue
            before = percentile(drawn[score], rng)
            for figure, value in truth.items():
                ends = found[score][figure]["interval_95"]
                low, high = (
                    end if end is not None else x for end, x in zip(ends, INFINITE, strict=True)
                )
                was = before[figure][0] <= value <= before[figure][1]
                one = (low - 1e-9 <= value <= high + 1e-9, was, high - low)
                held.setdefault((score, figure), []).append(one)
    lines = []
    for (score, figure), every in held.items():
        now, was, widths = (np.array(column, float) for column in zip(*every, strict=True))
        line = {"population": case.name, "rows": rows, "score": score, "figure": figure}
        line |= {"trials": len(every), "coverage": round(now.mean(), 3)}
        line |= {"percentile_bootstrap": round(was.mean(), 3)}
        line["median_width"] = float(f"{np.median(widths):.4g}")
        null = figure == "difference" and score in alarms
        line["p_below_0.05"] = round(alarms[score], 4) if null else None
        lines.append(line)
    return lines


INFINITE = (-math.inf, math.inf)


def percentile(one: Paired, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns the intervals of the paired percentile bootstrap."""
    rows = len(one.base)
    counts = rng.multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)
    with np.errstate(divide="ignore", invalid="ignore"):
        base, tuned = one.score(counts @ one.base), one.score(counts @ one.tuned)
    drawn = {"base": base, "tuned": tuned, "difference": tuned - base}
    return {name: np.nanpercentile(values, [2.5, 97.5]) for name, values in drawn.items()}


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
