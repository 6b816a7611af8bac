"""What do the runs of a study say together? Medians, ranges, and what a factor changes.

It works on rows of figures, one a run (sftlab/comparison/run_results.py), which `collect` makes.
"""

import statistics
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from sftlab.comparison import comparability
from sftlab.comparison.run_results import STEP_PARTS, figures, perplexity_of, read_results
from sftlab.comparison.run_settings import settings
from sftlab.comparison.study_file import Study, combination, options
from sftlab.runs.run_directory import SIDES

# Figures that a summary shows of a cell, where they were measured.
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
    "base known_perplexity",
)
# Figures that a study without speed does not have: its trainings run beside one another.
# Memory by part is a question of such studies too.
OF_SPEED = (
    *("step_time_s", "tokens_per_s", "rows_per_s", "share_of_limit", "train_seconds"),
    *(f"step_{part}_gb" for part in STEP_PARTS),
)
# Figures in which the factors of a grid are compared, and the least change that counts.
CHANGED = ("step_time_s", *(f"step_{part}_gb" for part in STEP_PARTS))
COUNTS = 0.05
# Scores in which cells are compared, and whether less of them is better.
LESS_IS_BETTER = {
    "tuned response_perplexity": True,
    "tuned bleu": False,
    "tuned rougeL": False,
    "tuned known_perplexity": True,
}


def task_scores(study: Study, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the tuned scores of the study's lm-eval tasks that any row has; more is better."""
    begins = tuple(f"tuned {task} " for task in study.harness.get("tasks", []))
    named = (key for row in rows for key in row if begins and key.startswith(begins))
    return list(dict.fromkeys(key for key in named if not key.endswith((" low", " high"))))


def collect(
    study: Study, not_run: Mapping[str, str], allow: bool = False
) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns a row of figures a task, and a line for each difference that the axis leaves.

    `not_run` says by name why tasks were not started. Raises ValueError where the cells differ in
    more than the axis, unless `allow`.
    """
    found = {task.name: read_results(task.folder) for task in study.tasks if task.has_run()}
    compared = {name: settings(one.run, one.quality, one.judged) for name, one in found.items()}
    if compared:
        comparability.resolve_axes(compared, study.axes, allow, study=True)
    rows = []
    for task in study.tasks:
        row = {"cell": task.cell, "repeat": task.repeat, "seed": task.fields.get("seed")}
        if task.name in found:
            row |= figures(found[task.name], compared[task.name].facts)
            row |= {} if study.speed else dict.fromkeys(OF_SPEED)
            if study.known_text:
                named = perplexity_of(study.known_text)
                for side in SIDES:
                    row[f"{side} known_perplexity"] = row.get(f"{side} {named}")
        else:
            row["status"] = "not run" if task.name in not_run else "failed"
            row["reason"] = not_run.get(task.name) or task.logged_error()
        rows.append(row)
    if is_scaling(study):
        losses = {name: dict(map(tuple, one.run.get("losses", []))) for name, one in found.items()}
        add_scaling(study, rows, losses)
    return rows, comparability.describe(comparability.differences(compared, study.axes))


def is_scaling(study: Study) -> bool:
    """Returns whether cells differ only in the number of processes."""
    return study.axis == ["world_size"]


def add_scaling(
    study: Study, rows: Sequence[dict[str, Any]], losses: Mapping[str, Mapping[int, float]]
) -> None:
    """Add `efficiency` and `largest_loss_difference` to the rows of a study's tasks.

    `losses` are in nats, by task and step. Each run is compared with the one of the fewest
    processes in the same repeat. Efficiency is its rows/s over the other's, divided by how many
    times more processes it has. As the global batch is the same, losses of a step should agree.
    """
    pairs = zip(study.tasks, rows, strict=True)
    ran = [(task, row) for task, row in pairs if row["status"] == "succeeded"]
    for task, row in ran:
        same_repeat = [pair for pair in ran if pair[0].repeat == task.repeat]
        few, least = min(same_repeat, key=lambda pair: pair[0].processes)
        if row["rows_per_s"] and least["rows_per_s"]:
            speedup = row["rows_per_s"] / least["rows_per_s"]
            row["efficiency"] = speedup * few.processes / task.processes
        mine, theirs = losses[task.name], losses[few.name]
        row["largest_loss_difference"] = max(
            (abs(mine[s] - theirs[s]) for s in mine.keys() & theirs), default=None
        )


def summarise(study: Study, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a line a cell: median, lowest and highest of each figure, and how its runs ended."""
    tasks = task_scores(study, rows)
    of_tasks = [f"{side} {key.removeprefix('tuned ')}" for key in tasks for side in SIDES]
    lines = []
    for cell in study.cells:
        mine = [row for row in rows if row["cell"] == cell]
        good = [row for row in mine if row["status"] == "succeeded"]
        statuses = dict.fromkeys(row["status"] for row in mine)
        reason = next((row["reason"] for row in mine if row["reason"]), "")
        line = {"cell": cell, "runs": len(good), "status": ", ".join(statuses), "reason": reason}
        for key in (*MEASURED, *LESS_IS_BETTER, *of_tasks):
            values = sorted(row[key] for row in good if row.get(key) is not None)
            line[key] = statistics.median(values) if values else None
            line[f"{key} low"] = values[0] if values else None
            line[f"{key} high"] = values[-1] if values else None
        published = next((one for one in study.published if one["cell"] == cell), {})
        line |= {f"published {key}": value for key, value in published.items() if key != "cell"}
        lines.append(line)
    columns = dict.fromkeys(key for line in lines for key in line)
    return [{key: line.get(key) for key in columns} for line in lines]


def effects(study: Study, summary: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns what each factor of a grid changes: the median ratio of figures with and without it.

    The ratios are of pairs of cells that differ in this factor alone; their range is given too. A
    change is `up` or `down` where the median is 5 % or more from 1, else `same`.
    """
    found = []
    for factor in study.grid:
        one: dict[str, Any] = {"factor": factor}
        pairs = _cells_without_and_with(study, factor, summary)
        for key in CHANGED:
            ratios = sorted(
                with_[key] / without[key] for without, with_ in pairs if without[key] and with_[key]
            )
            if ratios:
                middle = statistics.median(ratios)
                one |= {key: middle, f"{key} low": ratios[0], f"{key} high": ratios[-1]}
                one[f"{key} is"] = _direction(middle)
        found.append(one)
    return found


def _cells_without_and_with(
    study: Study, factor: str, summary: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Returns the lines of every two cells that differ in this factor alone."""
    by_cell = {line["cell"]: line for line in summary}
    others = {name: fields for name, fields in study.grid.items() if name != factor}
    chosen = [{name for name, _ in option if name} for option in product(*options(others))]
    return [
        (
            by_cell[combination(study.grid, names)],
            by_cell[combination(study.grid, names | {factor})],
        )
        for names in chosen
    ]


def _direction(ratio: float) -> str:
    if ratio >= 1 + COUNTS:
        return "up"
    return "down" if ratio <= 1 - COUNTS else "same"
