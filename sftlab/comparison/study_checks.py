"""Is a study what its user meant? Mistakes that are found before anything is trained."""

import argparse

from sftlab.comparison.study_file import Study
from sftlab.paths import ROOT


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
