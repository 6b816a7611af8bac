"""Is a study what its user meant? Mistakes that are found before anything is trained."""

import argparse
import contextlib
import io
from collections.abc import Sequence

from sftlab.comparison.run_settings import canonical
from sftlab.comparison.study_file import Study
from sftlab.comparison.study_tasks import Task, as_word
from sftlab.comparison.tuned_field import at_value
from sftlab.paths import ROOT

# Fields that transformers refuses on a machine without the hardware for them.
_OF_THE_MACHINE = ("tf32", "bf16_full_eval")


def check_options(study: Study, arguments: argparse.Namespace) -> None:
    """Raise ValueError for what the command line asks in vain, before anything is trained."""
    if arguments.at_once < 1:
        raise ValueError(f"--at_once {arguments.at_once}: expected 1 or more trainings")
    for name in ("difference", "deviation"):
        if getattr(arguments, name) is not None and not arguments.power:
            raise ValueError(f"--{name} belongs to --power, which trains nothing: add --power")
    last = len(study.tuning) + len(study.tasks) - 1
    if arguments.task is not None and not 0 <= arguments.task <= last:
        raise ValueError(f"--task {arguments.task}: the study has tasks 0 to {last}")
    if study.known_text and not (ROOT / study.known_text).is_file():
        raise ValueError(f"known_text {study.known_text}: there is no such file")
    if arguments.known_text and not study.quality:
        raise ValueError("--known_text: the study evaluates nothing, as it lacks `quality: true`")


def check_fields(study: Study) -> None:
    """Raise ValueError for a field that no recipe has."""
    from sftlab.config.parser import check_names  # imports trl, which takes time

    for task in [*study.tuning, *study.tasks]:
        check_names(task.fields, f"{study.name}, {task.cell}: ")


def check_different(study: Study) -> None:
    """Raise ValueError for two cells that are the same training under two names."""
    cells: dict[str, str] = {}
    for task in study.tasks[: len(study.cells)]:
        fields = {k: as_word(v) for k, v in (task.recipe_fields() | dict(task.fields)).items()}
        same = canonical([fields, task.launch_config(), task.processes, task.flags])
        if (other := cells.setdefault(same, task.cell)) != task.cell:
            raise ValueError(
                f"{study.name}: the cells {other} and {task.cell} are the same training under two "
                "names: leave one out (repeats train a cell again)"
            )


def check_recipes(study: Study) -> None:
    """Raise ValueError for a cell whose recipe sft.py would refuse on every machine.

    No model and no data are loaded. What this machine alone lacks is left to the training.
    """
    tasks = study.tasks
    if study.tuning:
        lowest = study.tuning[0].fields[study.tuned]
        tasks = [*study.tuning, *(at_value(task, study.tuned, lowest) for task in tasks)]
    seen = set()
    for task in tasks:
        same = canonical([task.fields, task.launch, task.processes, task.flags])
        if same in seen:
            continue
        seen.add(same)
        try:
            _parse(task)
        except ValueError as error:
            machine = [one for one in _OF_THE_MACHINE if _is_on(task, one)]
            if not machine or not _parses_without(task, machine):
                raise ValueError(f"{study.name}, {task.name}: {error}") from error


def _parse(task: Task, more: Sequence[str] = ()) -> None:
    from sftlab.config.launch import exported, launched
    from sftlab.config.parser import parse_recipe  # imports trl, which takes time

    words = task.command()
    words = words[words.index("recipes/sft.py") + 1 :]
    with contextlib.chdir(ROOT):
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                variables = exported(task.launch, {"num_processes": task.processes, **task.flags})
        except SystemExit as error:  # accelerate's parser prints its usage, then the mistake
            mistake = said.getvalue().strip().rpartition("error: ")[2]
            raise ValueError(f"flags: {mistake}") from error
        with launched(variables) as launch:
            parse_recipe([*words, *more], launch)


def _parses_without(task: Task, fields: Sequence[str]) -> bool:
    try:
        _parse(task, [word for one in fields for word in (f"--{one}", "null")])
    except ValueError:
        return False
    return True


def _is_on(task: Task, field: str) -> bool:
    value = (task.recipe_fields() | dict(task.fields)).get(field)
    return as_word(value).lower() == "true"
