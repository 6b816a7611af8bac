"""Scaling is measured against the fewest processes of a repeat, and drawn beside published runs."""

import pytest
from conftest import ROOT

from sftlab.comparison.plots import draw_study
from sftlab.comparison.study_file import load
from sftlab.comparison.study_summary import add_scaling, summarise


@pytest.fixture
def study(tmp_path):
    return load(
        ROOT / "recipes" / "studies" / "ddp_scaling.yaml",
        tmp_path / "runs",
        {"random": "llama3.2-1b"},
    )


def rows_of(study, speeds):
    """A row a task; `speeds` are by processes and repeat, and a task without one failed."""
    rows = []
    for task in study.tasks:
        speed = speeds.get((task.processes, task.repeat))
        status = "succeeded" if speed else "out of memory"
        rows.append(
            {
                "cell": task.cell,
                "status": status,
                "reason": "",
                "rows_per_s": speed,
                "repeat": task.repeat,
            }
        )
    return rows


def test_efficiency_and_losses_are_against_the_fewest_processes_of_the_same_repeat(study):
    rows = rows_of(study, {(1, 1): 10.0, (2, 1): 19.0, (8, 1): 60.0, (2, 2): 21.0, (4, 2): 39.9})
    losses = {task.name: {1: 2.0, 2: 1.5} for task in study.tasks} | {
        "2 processes, 1": {1: 2.0, 2: 1.25}
    }
    add_scaling(study, rows, losses)
    found = {(row["cell"], row["repeat"]): row for row in rows if "efficiency" in row}
    assert {name: round(row["efficiency"], 4) for name, row in found.items()} == {
        ("1 process", 1): 1.0,
        ("2 processes", 1): 0.95,
        ("8 processes", 1): 0.75,
        ("2 processes", 2): 1.0,
        ("4 processes", 2): 0.95,
    }
    apart = {name: row["largest_loss_difference"] for name, row in found.items()}
    assert apart == {**dict.fromkeys(found, 0.0), ("2 processes", 1): 0.25}


def test_runs_without_losses_or_speed_have_no_claim(study):
    rows = rows_of(study, {(1, 1): 10.0, (2, 1): 19.0})
    rows[1]["rows_per_s"] = None
    add_scaling(study, rows, {task.name: {} for task in study.tasks})
    assert rows[0]["efficiency"] == 1.0 and "efficiency" not in rows[1]
    assert rows[0]["largest_loss_difference"] is None


def test_scaling_is_drawn_over_processes_beside_what_was_published(study, tmp_path):
    rows = rows_of(study, {(n, r): 80.0 * n * (1 - 0.01 * r) for n in (1, 2) for r in (1, 2, 3)})
    add_scaling(study, rows, {task.name: {1: 2.0} for task in study.tasks})
    assert draw_study(study, summarise(study, rows), tmp_path) == [
        "ddp_scaling",
        "ddp_scaling_over_processes",
    ]
    drawn = (tmp_path / "ddp_scaling_over_processes.svg").read_text(encoding="utf-8")
    assert ">ideal</text>" in drawn and ">published</text>" in drawn
    assert drawn.count(">100%</text>") == 2
    assert (tmp_path / "ddp_scaling_over_processes.png").stat().st_size > 5000


def test_a_study_of_anything_else_is_not_drawn_over_processes(tmp_path):
    study = load(
        ROOT / "recipes" / "studies" / "precision.yaml",
        tmp_path / "runs",
        {"random": "llama3.2-1b"},
    )
    rows = [
        {
            "cell": t.cell,
            "status": "succeeded",
            "reason": "",
            "rows_per_s": 5.0,
            "tokens_per_s": 9.0,
        }
        for t in study.tasks
    ]
    assert draw_study(study, summarise(study, rows), tmp_path) == ["precision"]
