"""How many seeds and rows a study needs, held against simulated studies."""

import math

import numpy as np
import pytest
import yaml
from conftest import ROOT
from scipy.stats import norm, ttest_1samp
from small_studies import SCRIPT

from sftlab.comparison.run_results import about
from sftlab.comparison.study_file import load
from sftlab.comparison.study_power import rows_needed, seeds_needed, smallest_found

STUDY = "recipes/studies/lora_rank.yaml"


@pytest.mark.parametrize(("seeds", "cells"), [(3, 1), (5, 6), (10, 3)])
def test_the_smallest_difference_is_found_in_four_of_five_studies(seeds, cells):
    rng = np.random.default_rng(0)
    shift = smallest_found(2.0, seeds, cells)
    drawn = rng.normal(shift, 2.0, (20_000, seeds))
    p = ttest_1samp(drawn, 0, axis=1).pvalue
    assert np.mean(p < 0.05 / cells) == pytest.approx(0.8, abs=0.01)


def test_the_seeds_needed_are_the_fewest_that_find_it():
    seeds = seeds_needed(1.0, 1.0, 6)
    assert smallest_found(1.0, seeds, 6) <= 1 < smallest_found(1.0, seeds - 1, 6)
    assert seeds_needed(1e-3, 1.0, 6) is None


def test_rows_needed_find_a_difference_of_two_independent_scores():
    rng = np.random.default_rng(0)
    deviation, rows = 10.0, 400
    half_width = norm.isf(0.025) * deviation / math.sqrt(rows)
    asked = rows_needed(1.5, rows, half_width)
    means = rng.normal(0, deviation / math.sqrt(asked), (20_000, 2)) + [0, 1.5]
    z = np.diff(means, axis=1)[:, 0] / (deviation * math.sqrt(2 / asked))
    assert np.mean(np.abs(z) > norm.isf(0.025)) == pytest.approx(0.8, abs=0.01)


def test_a_user_asks_before_anything_is_trained(tmp_path, capsys):
    argv = [STUDY, "--runs", str(tmp_path / "runs"), "--power"]
    SCRIPT.main([*argv, "--deviation", "1.5", "--difference", "2"])
    said = capsys.readouterr().out
    assert "6 comparisons with r16" in said
    assert "a difference of 2 takes 11 seeds" in said
    assert not (tmp_path / "runs").exists()
    for more, message in (
        ([], "no two cells have scores of three seeds"),
        (["--deviation", "0"], "--deviation 0.0: expected a number above 0"),
        (["--deviation", "1", "--difference", "nan"], "--difference nan: expected"),
    ):
        with pytest.raises(SystemExit, match=message):
            SCRIPT.main([*argv, *more])


def test_one_is_singular(tmp_path, capsys):
    path = tmp_path / "two.yaml"
    content = yaml.safe_load((ROOT / STUDY).read_text(encoding="utf-8"))
    cells = dict(list(content["cells"].items())[:2])
    content |= {"cells": cells, "reference": next(iter(cells))}
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    SCRIPT.main([str(path), "--power", "--deviation", "1.5"])
    assert capsys.readouterr().out.startswith("1 comparison with")
    task = load(path, tmp_path, {}).tasks[0]._replace(processes=1)
    _, not_run = SCRIPT.runnable([task], {task.name: "one"})
    assert set(not_run.values()) <= {"it needs 1 GPU"}
    recipe = {"num_train_epochs": 1.0, "max_steps": -1, "global_batch_size": 8, "max_length": 64}
    recipe |= {"model_name_or_path": "base", "dataset_name": "rows"}
    assert about({"recipe": recipe})["training"].startswith("1 epoch, global batch 8")
    assert about({"recipe": recipe | {"num_train_epochs": 2.5}})["training"].startswith("2.5 ep")
    assert about({"recipe": recipe | {"max_steps": 1}})["training"].startswith("1 step, ")


def test_studies_that_score_quality_have_five_seeds():
    contents = [yaml.safe_load(path.read_text()) for path in (ROOT / STUDY).parent.glob("*.yaml")]
    scored = [one for one in contents if one.get("quality")]
    assert len(scored) >= 8
    assert all(len(one["seeds"]) >= 5 for one in scored)
