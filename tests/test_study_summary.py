"""A study's summary claims a difference only if at least three seeds agree on it."""

import sys

import fork_server
import numpy as np
import pytest
import yaml
from conftest import ROOT, short_fields
from small_studies import SCRIPT, TWO, ended

from sftlab.comparison.study_claims import claims, finding_lines, least_found_line
from sftlab.comparison.study_file import load
from sftlab.comparison.study_summary import CHANGED, effects, summarise
from sftlab.comparison.study_tables import claims_table, summary_table, title_of
from sftlab.comparison.study_tasks import begin


@pytest.fixture
def write(base, rows, tmp_path):
    """Write a study on the test's base and rows."""
    fields = {k: v for k, v in short_fields(base, rows, tmp_path).items() if k != "output_dir"}

    def make(cells, **more):
        path = tmp_path / "small.yaml"
        content = {
            "recipe": "recipes/demo/attn_r16.yaml",
            "launch": "cpu",
            "axis": ["lora_r"],
            "fields": fields,
            "cells": cells,
        }
        path.write_text(yaml.safe_dump({**content, **more}, sort_keys=False), encoding="utf-8")
        return path

    return make


def runs_of(scores, score="tuned response_perplexity"):
    return [
        {"cell": cell, "seed": seed, "status": "succeeded", score: value, "reason": ""}
        for cell, values in scores.items()
        for seed, value in enumerate(values)
    ]


def words(write, tmp_path, scores, score="tuned response_perplexity"):
    study = load(write({name: {} for name in scores}), tmp_path, {})
    return [one["word"] for one in claims(study, runs_of(scores, score))]


def test_better_needs_three_seeds_and_a_difference_that_they_agree_on(write, tmp_path):
    assert words(write, tmp_path, {"a": [2.0, 2.1, 2.2], "b": [1.0, 1.11, 1.19]}) == ["better"]
    assert words(write, tmp_path, {"a": [2.0, 2.1, 2.2], "b": [3.0, 3.11, 3.19]}) == ["worse"]
    assert words(write, tmp_path, {"a": [2.0, 2.1, 2.2], "b": [3.0, 3.11, 3.19]}, "tuned bleu") == [
        "better"
    ]
    assert words(write, tmp_path, {"a": [2.0, 2.1], "b": [1.0, 1.11]}) == ["untested"]
    assert words(write, tmp_path, {"a": [2.0, 2.1, 2.2], "b": [1.0, 2.6, 2.3]}) == [
        "not distinguishable"
    ]
    for shift in (0.0, 1.0):  # no detectable difference can be named
        same = {"a": [2.0, 2.5, 3.0], "b": [2.0 + shift, 2.5 + shift, 3.0 + shift]}
        assert words(write, tmp_path, same) == ["untested: no spread over seeds"]


def test_a_sentence_says_what_was_found_and_how_sure_it_is(write, tmp_path):
    scores = {"a": [2.0, 2.1, 2.2], "b": [1.0, 1.11, 1.19], "c": [2.05, 2.0, 2.3], "d": [2.0]}
    study = load(write({name: {} for name in scores}), tmp_path, {})
    (line,) = finding_lines(claims(study, runs_of(scores)), title_of)
    assert line.startswith("Response perplexity, against a over 1 to 3 seeds: b better by 1 [0.9")
    assert "; c not distinguishable, at most " in line
    assert line.endswith(" apart; d untested.")
    assert finding_lines(claims(study, runs_of(scores, "tuned bleu")), title_of) == []


def test_cells_that_are_equal_are_rarely_called_better(write, tmp_path):
    rng = np.random.default_rng(0)
    study, wrong = load(write({name: {} for name in "abcd"}), tmp_path, {}), 0
    for _ in range(300):
        scores = {name: rng.normal(size=3).tolist() for name in "abcd"}
        wrong += any(one["word"] != "not distinguishable" for one in claims(study, runs_of(scores)))
    assert 1 <= wrong <= 30


def seven_cells(rng, seeds, shift):
    """A study of six cells that are `shift` standard deviations of a seed from the reference."""
    cells = {"a": rng.normal(size=seeds).tolist()}
    return cells | {name: (shift + rng.normal(size=seeds)).tolist() for name in "bcdefg"}


def test_five_seeds_find_five_deviations_and_intervals_say_what_p_says(write, tmp_path):
    rng, found = np.random.default_rng(0), []
    study = load(write({name: {} for name in "abcdefg"}), tmp_path, {})
    for _ in range(40):
        rows = []
        for score in ("tuned response_perplexity", "tuned bleu", "tuned rougeL"):
            rows += runs_of(seven_cells(rng, 5, 5.0), score)
        found += claims(study, rows)
    assert len(found) == 40 * 6 * 3
    assert np.mean([one["word"] in ("better", "worse") for one in found]) > 0.9
    for one in found:
        assert bool(one["low"] <= 0 <= one["high"]) is (one["p_holm"] >= 0.05)


def test_a_study_says_what_it_could_have_found(write, tmp_path):
    rng, hits = np.random.default_rng(0), []
    study = load(write({"a": {}, "b": {}}), tmp_path, {})
    for _ in range(300):  # sqrt(2) * 1.682 deviations are found in 80 % with one cell of five seeds
        scores = {"a": rng.normal(size=5), "b": 1.682 * np.sqrt(2) + rng.normal(size=5)}
        (one,) = claims(study, runs_of(scores, "tuned bleu"))
        hits.append(one["word"] == "better")
    assert 0.74 < np.mean(hits) < 0.86
    alike = claims(study, runs_of({"a": [80.0, 81, 82, 83, 84], "b": [80.2, 80.8, 82.3, 82.9, 84]}))
    assert claims_table(alike)[1][-1].startswith("not distinguishable: at most 0.")
    said = least_found_line(alike, title_of)
    assert said.startswith(
        "A difference of this size would have been found in 80 % of such studies"
    )
    assert f"response perplexity {alike[0]['least_found']:.3g}." in said
    two = claims(study, runs_of({"a": [80.0, 81], "b": [90.0, 91]}))
    assert (least_found_line(two, title_of), two[0]["p_holm"]) == ("", None)
    assert claims_table(two)[1][-3:] == ["", "2", "untested"]


def test_published_figures_are_shown_beside_their_own_model_and_cells_alone(write, tmp_path):
    path = write({"a": {}}, published=[{"cell": "a", "rows_per_s": 5.0}])
    assert load(path, tmp_path, {}).published
    assert not load(path, tmp_path, {"recipe": "recipes/demo/all_r8.yaml"}).published
    assert not load(path, tmp_path, {"max_length": "128"}).published
    study = ROOT / "recipes" / "studies" / "precision.yaml"
    assert load(study, tmp_path, {"random": "llama3.2-1b"}).published
    command = " ".join(load(study, tmp_path, {"random": "llama3.2-1b"}).tasks[0].command())
    assert "--save_adapter=false --split_fractions 1.0 0.0 0.0 " in command
    assert not load(study, tmp_path, {"random": "llama2-7b"}).published
    with pytest.raises(ValueError, match="published figures of b, which is none of the cells"):
        load(write({"a": {}}, published=[{"cell": "b", "rows_per_s": 5.0}]), tmp_path, {})
    for odd in (5, {"rows_per_s": 5.0}):
        with pytest.raises(ValueError, match="expected a cell and its figures"):
            load(write({"a": {}}, published=[odd]), tmp_path, {})


def test_a_summary_has_medians_ranges_and_what_was_published(write, tmp_path):
    study = load(
        write({"a": {}, "b": {}}, published=[{"cell": "a", "rows_per_s": 5.0}]), tmp_path, {}
    )
    rows = runs_of({"a": [1.0, 5.0, 2.0]}, "tokens_per_s")
    rows += [{"cell": "b", "seed": 0, "status": "out of memory", "reason": "CUDA out of memory"}]
    a, b = summarise(study, rows)
    assert (a["tokens_per_s"], a["tokens_per_s low"], a["tokens_per_s high"], a["runs"]) == (
        2.0,
        1.0,
        5.0,
        3,
    )
    assert (b["tokens_per_s"], b["runs"], b["status"], b["reason"]) == (
        None,
        0,
        "out of memory",
        "CUDA out of memory",
    )
    assert (a["published rows_per_s"], b["published rows_per_s"]) == (5.0, None)


def test_a_reason_of_several_lines_takes_one_row_of_the_table_and_one_line_of_the_terminal(
    write, tmp_path
):
    study = load(write({"a": {}}), tmp_path, {})
    ended(
        study.tasks[0].folder,
        "failed",
        "CompilationError: at 29:34:\n    mean = a | b\n           ^\nother dtypes",
    )
    assert (
        SCRIPT.result(study.tasks[0])
        == "failed (CompilationError: at 29:34: mean = a | b ^ other dtypes)"
    )
    row = {
        "cell": "a",
        "seed": 1,
        "status": "failed",
        "reason": "CompilationError: at 29:34:\n    mean = a | b",
    }
    assert (
        summary_table(summarise(study, [row]))[1][-1]
        == "failed: CompilationError: at 29:34: mean = a | b"
    )


def test_a_grid_has_every_combination_and_says_what_each_factor_changes(write, tmp_path):
    path = write(
        None,
        grid={"half": {"lora_r": 2, "lora_alpha": 4}, "twice": {"max_steps": 12}},
        axis=["lora_r"],
    )
    study = load(path, tmp_path, {})
    assert study.cells == ["none", "twice", "half", "half + twice"]
    assert [task.fields["max_steps"] for task in study.tasks] == ["6", 12, "6", 12]
    seconds = {"none": 4.0, "twice": 8.4, "half": 2.0, "half + twice": 4.0}
    summary = [{"cell": cell} | dict.fromkeys(CHANGED, seconds[cell]) for cell in study.cells]
    half, twice = effects(study, summary)
    assert (half["factor"], half["step_time_s is"], half["step_time_s"]) == (
        "half",
        "down",
        pytest.approx(0.488, abs=1e-3),
    )
    assert (twice["step_time_s is"], twice["step_time_s low"], twice["step_time_s high"]) == (
        "up",
        2.0,
        2.1,
    )
    summary = [
        {"cell": cell} | dict.fromkeys(CHANGED, 1.0 if cell == "none" else 1.02)
        for cell in study.cells
    ]
    assert {one["step_time_s is"] for one in effects(study, summary)} == {"same"}
    summary[0] |= dict.fromkeys(CHANGED)
    assert effects(study, summary)[0]["step_time_s low"] == 1.0


def test_an_evaluation_that_fails_is_said(write, tmp_path, monkeypatch, capsys):
    path = write(TWO, quality=True)
    for task in load(path, tmp_path / "runs", {}).tasks:
        begin(task)
        ended(task.folder, "succeeded")
        (task.folder / "adapter").mkdir()
    monkeypatch.setattr(SCRIPT, "write", lambda *args: None)
    monkeypatch.setattr(sys, "executable", fork_server.python())
    with pytest.raises(SystemExit) as stopped:
        SCRIPT.main([str(path), "--runs", str(tmp_path / "runs")])
    assert "an evaluation failed" in str(stopped.value) and "r4-1/log" in str(stopped.value)
    assert "done before" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="the study has tasks 0 to 1"):
        SCRIPT.main([str(path), "--runs", str(tmp_path / "runs"), "--task", "2"])
