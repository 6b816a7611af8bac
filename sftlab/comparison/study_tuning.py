"""Which learning rate is best for each cell of a study?

Every cell is trained at every value of the tuned field, with the study's first seed. The value of
the lowest validation loss is then trained with all seeds, and only those runs meet the test split.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sftlab.comparison.run_results import outcome
from sftlab.comparison.study_file import Study
from sftlab.comparison.study_tasks import Task, is_done
from sftlab.comparison.tuned_field import at_value
from sftlab.runs.run_directory import read_run
from sftlab.tables import figure

Table = list[list[str]]


class Trial(NamedTuple):
    """A cell at one value: its validation loss in nats a token, None where it diverged.

    `best` is the cell's lowest loss. `at_end` says that the best value is the lowest or highest of
    the grid, so that a wider grid might hold a better one.
    """

    cell: str
    value: float
    status: str
    validation_loss: float | None
    best: bool
    at_end: bool


def trials(study: Study) -> list[Trial]:
    """Returns every cell at every value, in the order of the cells and of the values.

    Raises ValueError where a training has no result, or has succeeded without a validation loss.
    """
    if waiting := [task for task in study.tuning if not is_done(task)]:
        raise ValueError(
            f"{len(waiting)} of {len(study.tuning)} trainings that choose {study.tuned} have no "
            f"result, the first is {waiting[0].name}: see {waiting[0].folder / 'log'}"
        )
    found = []
    for cell in study.cells:
        losses = {_value(study, one): _loss(one) for one in study.tuning if one.cell == cell}
        known = {value: loss for value, (_, loss) in losses.items() if loss is not None}
        best = min(known, key=known.__getitem__) if known else min(losses)
        ends = (min(losses), max(losses))
        found += [
            Trial(cell, value, status, loss, value == best, value == best and best in ends)
            for value, (status, loss) in sorted(losses.items())
        ]
    return found


def at_best(study: Study) -> Study:
    """Returns the study whose cells are trained at their own best value."""
    best = {one.cell: one.value for one in trials(study) if one.best}
    tasks = [at_value(task, study.tuned, best[task.cell]) for task in study.tasks]
    return replace(study, tasks=tasks)


def _value(study: Study, task: Task) -> float:
    return float(task.fields[study.tuned])


def _loss(task: Task) -> tuple[str, float | None]:
    run = read_run(task.folder)
    status = outcome(run)[0]
    loss = (run.get("measured") or {}).get("validation_loss")
    if status == "succeeded" and loss is None:
        raise ValueError(
            f"{task.name} has no validation loss to choose by: its recipe needs a validation "
            "split (split_fractions)"
        )
    return status, loss if status == "succeeded" else None


def tuning_rows(found: Sequence[Trial], field: str) -> list[dict[str, Any]]:
    """Returns a row a trial for tuning.csv."""
    rows = []
    for one in found:
        row = one._asdict()
        rows.append({"cell": row.pop("cell"), field: row.pop("value"), **row})
    return rows


def tuning_table(found: Sequence[Trial], field: str) -> Table:
    """Returns a heading, and a row a cell with the loss at each value, the best one marked *."""
    values = sorted({one.value for one in found})
    table = [["cell", *(f"{field} {value:g}" for value in values), "best"]]
    for cell in dict.fromkeys(one.cell for one in found):
        mine: Mapping[float, Trial] = {one.value: one for one in found if one.cell == cell}
        chosen = next(one for one in mine.values() if one.best)
        ends = ", at an end of the grid" if chosen.at_end else ""
        cells = [_shown(mine[value]) if value in mine else "" for value in values]
        table.append([cell, *cells, f"{chosen.value:g}{ends}"])
    return table


def _shown(one: Trial) -> str:
    if one.validation_loss is None:
        return one.status
    return figure(one.validation_loss) + (" *" if one.best else "")
