"""What does the page of a study say, study.md?"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftlab.comparison.run_results import about
from sftlab.comparison.study_claims import finding_lines, least_found_line
from sftlab.comparison.study_file import Study
from sftlab.comparison.study_output import RUNS_LINE
from sftlab.comparison.study_summary import COUNTS
from sftlab.comparison.study_tables import claims_table, effects_table, summary_table, title_of
from sftlab.comparison.study_tuning import Trial, tuning_table
from sftlab.runs.run_directory import read_run
from sftlab.tables import markdown


def heading(study: Study, unexplained: list[str], argv: list[str], runs: Path) -> list[str]:
    """Returns the first lines of study.md: command, hardware, versions, data, axis and runs."""
    command = shlex.join(word for word in argv if word != "--no_train")
    ran = next((task for task in study.tasks if task.has_run()), None)
    facts = about(read_run(ran.folder)) if ran else {}
    lines = [f"# {study.title}", ""]
    if unexplained:
        lines += ["**CONFOUNDED**: the cells differ in more than the axis, in"]
        lines += ["", *(f"- {line}" for line in unexplained), ""]
    lines += ["```", f"python recipes/study.py {command}", "```", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    return [*lines, f"- axis: {', '.join(study.axis)}", f"{RUNS_LINE}{runs}", ""]


def unreached_line(study: Study) -> str:
    """Returns which trainings never reached their learning rate, in a sentence; empty if none."""
    from sftlab.config.schedule import warmup_share  # imports transformers, which takes time

    trained = {one.folder for one in (*study.tuning, *study.tasks) if one.has_run()}
    shares = [warmup_share(read_run(folder)["recipe"]) for folder in trained]
    short = [share for share in shares if share < 1]
    if not short:
        return ""
    said = "No training reached its learning rate"
    if len(short) < len(shares):
        said = f"{len(short)} of {len(shares)} trainings did not reach their learning rate"
    return (
        f"{said}, as warmup_steps is above max_steps: the rate ended at {max(short):.0%} of it at "
        "most."
    )


def tuning_lines(study: Study, tried: Sequence[Trial]) -> list[str]:
    """Returns the table of what was tried, and how to read it."""
    seed = study.tuning[0].fields.get("seed")
    with_seed = "" if seed is None else f" with seed {seed}"
    times = len(study.tasks) // len(study.cells)
    with_all = "with every seed" if "seed" in study.axes else f"{times} times"
    # one training of a cell at its best value is the one in the table
    again = f", at which the cell was then trained {with_all}" if times > 1 else ""
    lines = [
        f"## Which {study.tuned} is best for each cell?",
        "",
        f"Validation loss of each cell at each value{with_seed}; * marks the lowest{again}. "
        "A column compares the cells at one fixed value.",
        "",
    ]
    return [*lines, *markdown(tuning_table(tried, study.tuned)), ""]


def result_lines(
    study: Study,
    summary: list[dict[str, Any]],
    changed: list[dict[str, Any]],
    found: list[dict[str, Any]],
) -> list[str]:
    """Returns the tables of study.md, each with a line that says how to read it."""
    known = f" Published: {study.published_as}." if study.published and study.published_as else ""
    lines = [line for finding in finding_lines(found, title_of) for line in (finding, "")]
    lines += [f"Median of the runs, lowest and highest in brackets.{known}", ""]
    lines += [*markdown(summary_table(summary)), ""]
    if changed:
        lines += [
            "Ratio of the figure with a technique to that without it, all else equal: median of "
            "the pairs, lowest and highest in brackets. ↑ and ↓ mark changes of "
            f"{COUNTS:.0%} or more.",
            "",
        ]
        lines += [*markdown(effects_table(changed)), ""]
    if found:
        lines += [
            f"Difference from {study.reference} over pairs of equal seed. p is after Holm over the "
            "cells of a score, and the 95 % intervals in brackets are adjusted like it:",
            "",
        ]
        lines += [*markdown(claims_table(found)), ""]
        if least := least_found_line(found, title_of):
            lines += [least, ""]
    return lines
