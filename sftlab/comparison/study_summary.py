"""What the runs of a study say together: medians and ranges, what a technique changes, which cell
is better.

Works on rows of figures, one a run (sftlab/comparison/run_results.py), made by `collect`.
"""

import statistics
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from scipy.stats import ttest_rel

from sftlab.comparison import comparability
from sftlab.comparison.run_results import STEP_PARTS, figures, read_evidence
from sftlab.comparison.study_file import Study, combination, options
from sftlab.evaluation.significance import add_holm
from sftlab.tables import figure, p_value, preview, without_empty_columns

# What a summary shows of a cell, where it was measured; and whether less is better, where 'better'
# means something.
MEASURED = (
    "tokens_per_s",
    "rows_per_s",
    "efficiency",
    "share_of_limit",
    "peak_memory_gb",
    "step_time_s",
    "collectives",
    "collectives_mb",
    *(f"step_{part}_gb" for part in STEP_PARTS),
    "trainable_parameters",
    "train_loss",
    "largest_loss_difference",
    "validation_loss",
)
# What the factors of a grid are said to change, and the change from which it counts.
CHANGED = ("step_time_s", *(f"step_{part}_gb" for part in STEP_PARTS))
COUNTS = 0.05
LESS_IS_BETTER = {"tuned response_perplexity": True, "tuned bleu": False, "tuned rougeL": False}
SEEDS_FOR_A_CLAIM = 3
TITLES = {
    "tokens_per_s": "real tokens/s", "rows_per_s": "rows/s", "efficiency": "efficiency",
    "share_of_limit": "share of the limit", "peak_memory_gb": "peak GB a rank", "step_time_s": "step s",
    "step_parameters_gb": "parameters GB", "step_gradients_gb": "gradients GB",
    "step_optimizer_state_gb": "optimizer state GB", "step_activations_gb": "activations GB",
    "step_peak_gb": "a step's peak GB", "collectives": "collectives a step", "collectives_mb": "their MB",
    "trainable_parameters": "trainable parameters", "train_loss": "train loss",
    "largest_loss_difference": "largest loss difference", "validation_loss": "validation loss",
    "tuned response_perplexity": "perplexity of the response", "tuned bleu": "BLEU", "tuned rougeL": "ROUGE-L",
}  # fmt: skip


def collect(
    study: Study, not_run: Mapping[str, str], allow_confounded: bool = False
) -> tuple[list[dict], list[str]]:
    """A row of figures a task, and what confounds the study.

    ValueError for a confounded one unless allowed.

    `not_run` says of tasks (by name) why they were not started.
    """
    found = {
        task.name: read_evidence(task.folder)
        for task in study.tasks
        if (task.folder / "run.json").is_file()
    }
    settings = {
        name: comparability.settings(one.run, one.quality, one.judged)
        for name, one in found.items()
    }
    if settings:
        comparability.settle_axes(settings, study.axes, allow_confounded)
    rows = []
    for task in study.tasks:
        row = {"cell": task.cell, "repeat": task.repeat, "seed": task.fields.get("seed")}
        if task.name in found:
            row |= figures(found[task.name], settings[task.name].facts)
        else:
            row["status"] = "not run" if task.name in not_run else "failed"
            row["reason"] = not_run.get(task.name) or task.last_words()
        rows.append(row)
    if is_scaling(study):
        add_scaling(
            study,
            rows,
            {name: dict(map(tuple, one.run.get("losses", []))) for name, one in found.items()},
        )
    return rows, comparability.describe(comparability.differences(settings, study.axes))


def is_scaling(study: Study) -> bool:
    """Whether cells differ in the number of processes alone."""
    return study.axis == ["world_size"]


def add_scaling(
    study: Study, rows: Sequence[dict[str, Any]], losses: Mapping[str, Mapping[int, float]]
) -> None:
    """Add `efficiency` and `largest_loss_difference` to the rows of a study's tasks.

    `losses` by task and step.

    Against the fewest processes that ran in the same repeat: rows/s over theirs times so many more
    processes, and the losses (nats) of any logged step, which one global batch should leave alike.
    """
    ran = [
        (task, row)
        for task, row in zip(study.tasks, rows, strict=True)
        if row["status"] == "succeeded"
    ]
    for task, row in ran:
        few, least = min(
            ((t, r) for t, r in ran if t.repeat == task.repeat), key=lambda pair: pair[0].processes
        )
        if row["rows_per_s"] and least["rows_per_s"]:
            row["efficiency"] = (
                row["rows_per_s"] / least["rows_per_s"] * few.processes / task.processes
            )
        mine, theirs = losses[task.name], losses[few.name]
        row["largest_loss_difference"] = max(
            (abs(mine[s] - theirs[s]) for s in mine.keys() & theirs), default=None
        )


def summarise(study: Study, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line a cell: median, lowest and highest of every figure over the runs that have it, and how
    they ended.
    """
    lines = []
    for cell in study.cells:
        mine = [row for row in rows if row["cell"] == cell]
        good = [row for row in mine if row["status"] == "succeeded"]
        ends = dict.fromkeys(row["status"] for row in mine)
        reason = next((row["reason"] for row in mine if row["reason"]), "")
        line = {"cell": cell, "runs": len(good), "status": ", ".join(ends), "reason": reason}
        for key in (*MEASURED, *LESS_IS_BETTER):
            values = sorted(row[key] for row in good if row.get(key) is not None)
            line[key] = statistics.median(values) if values else None
            line[f"{key} low"], line[f"{key} high"] = (
                (values[0], values[-1]) if values else (None, None)
            )
        published = next((one for one in study.published if one["cell"] == cell), {})
        line |= {f"published {key}": value for key, value in published.items() if key != "cell"}
        lines.append(line)
    columns = dict.fromkeys(key for line in lines for key in line)
    return [{key: line.get(key) for key in columns} for line in lines]


def effects(study: Study, summary: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each factor of a grid changes: the median ratio of cells with it to those without, all
    else equal.

    The range is over those pairs; a change counts where the median is 5 % or more from 1 (`up` or
    `down`, else `same`).
    """
    by_cell, found = {line["cell"]: line for line in summary}, []
    for factor in study.grid:
        others = product(
            *options({name: fields for name, fields in study.grid.items() if name != factor})
        )
        pairs = []
        for chosen in others:
            names = {name for name, _ in chosen if name}
            both = [combination(study.grid, each) for each in (names, names | {factor})]
            pairs.append([by_cell[name] for name in both])
        one: dict[str, Any] = {"factor": factor}
        for key in CHANGED:
            ratios = sorted(
                with_[key] / without[key] for without, with_ in pairs if without[key] and with_[key]
            )
            if ratios:
                middle = statistics.median(ratios)
                one |= {key: middle, f"{key} low": ratios[0], f"{key} high": ratios[-1]}
                one[f"{key} is"] = (
                    "up" if middle >= 1 + COUNTS else "down" if middle <= 1 - COUNTS else "same"
                )
        found.append(one)
    return found


def claims(study: Study, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each cell against the reference in every score: the difference over seeds and whether it is
    'better' or 'worse'.

    Runs of equal seed are pairs (paired t-test over seeds, Student 1908), p-values after Holm over
    all comparisons. With fewer than three pairs, or p above 0.05, the word is 'not
    distinguishable'.
    """
    reference, found = study.reference, {}
    for cell in (cell for cell in study.cells if cell != reference):
        for score in LESS_IS_BETTER:
            pairs = _pairs(rows, reference, cell, score)
            if not pairs:
                continue
            first, mine = np.array(pairs).T
            one = {"cell": cell, "against": reference, "score": score, "seeds": len(pairs)}
            one |= {
                "difference": float((mine - first).mean()),
                "p_value": 1.0,
                "low": None,
                "high": None,
            }
            if len(pairs) >= SEEDS_FOR_A_CLAIM and len(set((mine - first).tolist())) > 1:
                test = ttest_rel(mine, first)
                one["p_value"], (one["low"], one["high"]) = (
                    float(test.pvalue),
                    test.confidence_interval(),
                )
            found[f"{cell} {score}"] = one
    add_holm(found)
    for one in found.values():
        sure = one["seeds"] >= SEEDS_FOR_A_CLAIM and one["p_holm"] < 0.05
        better = (one["difference"] < 0) == LESS_IS_BETTER[one["score"]]
        one["word"] = ("better" if better else "worse") if sure else "not distinguishable"
    return list(found.values())


def _pairs(
    rows: Sequence[Mapping[str, Any]], a: str, b: str, score: str
) -> list[tuple[float, float]]:
    values: dict[str, dict[Any, float]] = {a: {}, b: {}}
    for row in rows:
        if row["cell"] in values and row["status"] == "succeeded" and row.get(score) is not None:
            values[row["cell"]][row["seed"]] = row[score]
    return [(values[a][seed], values[b][seed]) for seed in values[a] if seed in values[b]]


def table(summary: list[dict[str, Any]]) -> list[list[str]]:
    """Heading and a row a cell; columns without any value are left out."""
    published = [key for key in summary[0] if key.startswith("published ")]
    shown = [key for key in TITLES if key in summary[0]]
    lines = [["cell", "runs", *(TITLES[key] for key in shown), *published, "ended"]]
    for line in summary:
        cells = [line["cell"], str(line["runs"])]
        for key in shown:
            low, high = line[f"{key} low"], line[f"{key} high"]
            spread = "" if low == high else f" [{figure(low)}, {figure(high)}]"
            cells.append("" if line[key] is None else figure(line[key]) + spread)
        cells += ["" if line[key] is None else str(line[key]) for key in published]
        lines.append(
            [
                *cells,
                ""
                if line["status"] == "succeeded"
                else preview(f"{line['status']}: {line['reason'] or ''}", 90),
            ]
        )
    return without_empty_columns(lines)


def claims_table(said: list[dict[str, Any]]) -> list[list[str]]:
    """Heading and a row a comparison."""
    lines = [["cell", "score", "difference", "p", "seeds", "so it is"]]
    for one in said:
        ends = "" if one["low"] is None else f" [{figure(one['low'])}, {figure(one['high'])}]"
        cells = [
            one["cell"],
            TITLES[one["score"]],
            figure(one["difference"]) + ends,
            p_value(one["p_holm"]),
        ]
        lines.append([*cells, str(one["seeds"]), one["word"]])
    return lines


def effects_table(changed: list[dict[str, Any]]) -> list[list[str]]:
    """Heading and a row a technique."""
    arrows = {"up": "↑", "down": "↓", "same": "="}
    keys = [key for key in CHANGED if any(key in one for one in changed)]
    lines = [["technique", *(TITLES[key].removesuffix(" GB").removesuffix(" s") for key in keys)]]
    for one in changed:
        found = [[one.get(f"{key}{end}") for end in (" is", "", " low", " high")] for key in keys]
        cells = [
            "" if is_ is None else f"{arrows[is_]} {m:.2f} [{low:.2f}, {high:.2f}]"
            for is_, m, low, high in found
        ]
        lines.append([one["factor"], *cells])
    return lines
