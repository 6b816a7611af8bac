"""A study that tunes trains each cell at its own best value, by the validation loss alone."""

import csv
import json

import pytest
import yaml
from conftest import short_fields
from small_studies import SCRIPT, TWO, ended

from sftlab.comparison.study_file import check_comparable, load
from sftlab.comparison.study_page import tuning_lines, unreached_line
from sftlab.comparison.study_tasks import begin, is_done
from sftlab.comparison.study_tuning import Trial, at_best, trials, tuning_table
from sftlab.comparison.tuning_plot import shown_losses

STUDY = {
    "recipe": "recipes/demo/attn_r16.yaml",
    "launch": "cpu",
    "axis": ["lora_r"],
    "seeds": [1, 2, 3],
    "tune": {"learning_rate": [0.004, "1e-3", 0.016]},
    "cells": TWO,
}
LOSSES = {"r4": {0.001: 2.0, 0.004: 1.5, 0.016: None}, "r2": {0.001: 2.0, 0.004: 1.9, 0.016: 1.8}}


@pytest.fixture
def study(tmp_path):
    return written(tmp_path, STUDY)


def written(tmp_path, content, **given):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return load(path, tmp_path / "runs", given)


def train(study):
    for task in study.tuning:
        begin(task)
        loss = LOSSES[task.cell][task.fields["learning_rate"]]
        measured = {} if loss is None else {"validation_loss": loss}
        reason = "FloatingPointError: the loss is nan in step 3: diverged"
        ended(task.folder, *(("failed", reason) if loss is None else ("succeeded",)), **measured)


def test_every_cell_is_tried_at_every_value_with_the_first_seed(study):
    tried = {(one.cell, one.fields["learning_rate"], one.fields["seed"]) for one in study.tuning}
    assert tried == {(cell, rate, 1) for cell in TWO for rate in (0.001, 0.004, 0.016)}
    check_comparable(study)


def test_each_cell_goes_on_at_its_own_best_value(study):
    train(study)
    tuned = at_best(study)
    rates = {(one.cell, one.fields["seed"]): one.fields["learning_rate"] for one in tuned.tasks}
    assert rates == {("r4", n): 0.004 for n in (1, 2, 3)} | {("r2", n): 0.016 for n in (1, 2, 3)}
    check_comparable(tuned)
    # the first seed is trained already
    commands = [task.command() for task in study.tuning]
    assert [task.command() in commands for task in tuned.tasks] == [True] * 2 + [False] * 4


def test_the_table_has_every_loss_and_says_where_the_grid_ends(study):
    train(study)
    heading, r4, r2 = tuning_table(trials(study), study.tuned)
    assert heading[1:4] == [f"learning_rate {rate}" for rate in ("0.001", "0.004", "0.016")]
    assert r4 == ["r4", "2", "1.5 *", "diverged", "0.004"]
    assert r2 == ["r2", "2", "1.9", "1.8 *", "0.016, at an end of the grid"]


def test_a_rate_that_the_warmup_never_reached_is_said(study, tmp_path, monkeypatch, capsys):
    train(study)
    assert unreached_line(study) == ""
    for task in study.tuning:
        path = task.folder / "run.json"
        run = json.loads(path.read_text(encoding="utf-8"))
        run["recipe"] |= {"warmup_steps": 30, "max_steps": 5}
        path.write_text(json.dumps(run), encoding="utf-8")
        if task == study.tuning[0]:
            assert unreached_line(study).startswith("1 of 6 trainings did not reach their")
    said = "No training reached its learning rate, as warmup_steps is above max_steps: the rate "
    said += "ended at 17% of it at most."
    assert unreached_line(study) == said
    rows = [{"cell": cell, "seed": 1, "status": "succeeded", "reason": ""} for cell in TWO]
    monkeypatch.setattr(SCRIPT, "collect", lambda *args: (rows, []))
    monkeypatch.setattr(SCRIPT, "heading", lambda *args: [])
    SCRIPT.write(at_best(study), {}, tmp_path / "out", False, [], tmp_path / "runs")
    assert said in (tmp_path / "out" / "study.md").read_text(encoding="utf-8").splitlines()
    assert said in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seeds": [1]}, "with seed 1; * marks the lowest. A column"),
        ({"seeds": [1, 2]}, "lowest, at which the cell was then trained with every seed. A"),
        ({"seeds": None, "repeats": 2}, "lowest, at which the cell was then trained 2 times. A"),
    ],
)
def test_the_page_says_how_often_a_cell_is_trained_at_its_best_value(tmp_path, change, said):
    study = written(tmp_path, STUDY | change)
    train(study)
    assert said in "\n".join(tuning_lines(study, trials(study)))


def test_one_training_that_went_wrong_does_not_press_the_others_into_a_line():
    losses = {"r4": (0.7, 0.6, 5.2), "r2": (0.8, 0.7, None)}
    tried = [
        Trial(cell, value, "succeeded", loss, loss == min(filter(None, mine)), False)
        for cell, mine in losses.items()
        for value, loss in zip((1e-3, 3e-3, 1e-2), mine, strict=True)
    ]
    low, high = shown_losses(tried)
    assert 0.5 < low < 0.6 and 0.8 < high < 0.9, "5.2 is the neighbour of a best value"
    wide = [*tried, Trial("r4", 3e-2, "succeeded", 80.0, False, False)]
    assert shown_losses(wide) == (low, high)
    far = [*tried, Trial("r1", 1e-3, "succeeded", 3.0, True, False)]
    low, high = shown_losses(far)
    assert low < 0.6 and 3 < high < 3.5, "each cell's best is in the frame"


def test_memory_that_ran_out_beside_others_is_no_result_of_an_interrupted_second_start(study):
    task = study.tuning[0]
    begin(task, beside=3)
    ended(task.folder, "failed", "OutOfMemoryError: CUDA out of memory")
    assert not is_done(task)
    begin(task)  # alone, and killed before it writes run.json
    assert not is_done(task)


def test_nothing_is_chosen_before_every_training_has_a_result(study):
    with pytest.raises(ValueError, match="6 of 6 trainings that choose learning_rate have no"):
        at_best(study)
    train(study)
    for task in study.tuning:
        ended(task.folder, "succeeded")
    with pytest.raises(ValueError, match="has no validation loss to choose by"):
        at_best(study)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tune": {"learning_rate": 0.1}}, "tune, learning_rate: got 0.1, expected two"),
        ({"tune": {"learning_rate": [0.1]}}, "expected two different numbers"),
        ({"tune": {"learning_rate": [0.1, 0.1]}}, "expected two different numbers"),
        ({"tune": {"learning_rate": [0.1, "high"]}}, "expected two different numbers"),
        ({"tune": {"learning_rate": [0.1, float("inf")]}}, "expected two different numbers"),
        ({"tune": {"a": [1, 2], "b": [1, 2]}}, "tune names a, b: expected one field"),
        ({"tune": {"lora_r": [1, 2]}}, "tunes lora_r, which r4 sets already"),
        ({"fields": {"learning_rate": 0.1}}, "tunes learning_rate: --learning_rate or `fields`"),
        ({"tune": [0.1]}, "tune is \\[0.1\\]: expected lines of name: value"),
    ],
)
def test_what_cannot_be_tuned_is_refused(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        written(tmp_path, STUDY | changes)


def test_a_field_that_no_recipe_has_is_refused_before_anything_runs(tmp_path, capsys):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(STUDY | {"tune": {"learning_rat": [1, 2]}}), encoding="utf-8")
    with pytest.raises(SystemExit, match="did you mean 'learning_rate'"):
        SCRIPT.main([str(path), "--runs", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


def test_tasks_of_an_array_choose_first(study, tmp_path):
    dry = [str(tmp_path / "small.yaml"), "--runs", str(tmp_path / "runs"), "--task"]
    with pytest.raises(SystemExit, match="trainings that choose learning_rate have no result"):
        SCRIPT.main([*dry, "6"])
    train(study)
    with pytest.raises(SystemExit, match="--task 12: the study has tasks 0 to 11"):
        SCRIPT.main([*dry, "12"])


@pytest.mark.long
def test_a_small_study_is_tuned_and_told(base, rows, tmp_path, capsys):
    fields = {k: v for k, v in short_fields(base, rows, tmp_path).items() if k != "output_dir"}
    del fields["learning_rate"]
    path = tmp_path / "small.yaml"
    content = STUDY | {"fields": fields, "seeds": [1, 2]}
    content |= {"tune": {"learning_rate": [0.001, 0.01]}}
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    argv = [str(path), "--runs", str(tmp_path / "runs"), "--at_once", "2"]
    SCRIPT.main(argv)
    assert "learning_rate 0.01" in capsys.readouterr().out
    with (tmp_path / "runs" / "tuning.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [row["best"] for row in found].count("True") == 2
    text = (tmp_path / "runs" / "study.md").read_text()
    assert "## Which learning_rate is best for each cell?" in text
    assert (tmp_path / "runs" / "small_tuning.svg").is_file()
    SCRIPT.main([*argv, "--no_train"])
