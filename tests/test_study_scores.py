"""A study evaluates its runs as its file says, and shows what the tuning forgot."""

import csv
import json
import sys
from types import SimpleNamespace

import pytest
import yaml
from report_runs import run_writer
from small_studies import SCRIPT, TWO

from sftlab.comparison.study_file import load
from sftlab.comparison.study_summary import collect, summarise
from sftlab.comparison.study_tables import summary_table
from sftlab.comparison.timed_turns import Command, in_turn
from sftlab.runs.run_directory import adapter_hash

STUDY = {
    "recipe": "recipes/demo/attn_r16.yaml",
    "launch": "cpu",
    "axis": ["lora_r"],
    "seeds": [1],
    "cells": TWO,
    "quality": True,
}


def written(tmp_path, **more):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(STUDY | more, sort_keys=False), encoding="utf-8")
    return load(path, tmp_path / "runs", {})


@pytest.mark.parametrize(
    ("more", "found", "asked"),
    [
        ({}, ({}, []), [[]]),
        ({"quality_options": {"samples": 20}}, ({}, []), [["--samples=20"]]),
        ({"known_text": "k.jsonl"}, ({}, []), [[], ["--dataset_name", "k.jsonl"]]),
        ({"known_text": "k.jsonl"}, ({"scores": {}}, []), [["--dataset_name", "k.jsonl"]]),
        ({"known_text": "k.jsonl"}, ({"scores": {}}, ["k.jsonl"]), []),
        ({"known_text": "k.jsonl"}, ({"scores": {}}, ["o.jsonl"]), [["--dataset_name", "k.jsonl"]]),
        ({"quality": False, "known_text": "k.jsonl"}, ({}, []), []),
    ],
)
def test_what_a_run_lacks_is_evaluated(tmp_path, monkeypatch, more, found, asked):
    study, calls = written(tmp_path, **more), []

    def run(command, **options):
        calls.append(command[4:])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(SCRIPT.subprocess, "run", run)
    texts = [{"held_out": {"dataset": name}} for name in found[1]]
    results = SimpleNamespace(quality=found[0], texts=texts)
    monkeypatch.setattr(SCRIPT, "read_results", lambda folder: results)
    for task in study.tasks:
        (task.folder / "adapter").mkdir(parents=True)
    assert SCRIPT.score_together(study, study.tasks, at_once=1) == []
    assert calls == asked * len(study.tasks)


def test_an_evaluation_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    study = written(tmp_path)
    fails = lambda command, **_: SimpleNamespace(returncode="r4" in command[3])  # noqa: E731
    monkeypatch.setattr(SCRIPT.subprocess, "run", fails)
    monkeypatch.setattr(SCRIPT, "read_results", lambda _: SimpleNamespace(quality={}, texts=[]))
    for task in study.tasks:
        (task.folder / "adapter").mkdir(parents=True)
    unscored = SCRIPT.score_together(study, study.tasks, at_once=2)
    assert [task.cell for task in unscored] == ["r4"]


def test_the_command_line_names_a_text_that_the_base_model_knew(tmp_path):
    written(tmp_path, known_text="k.jsonl")
    path = tmp_path / "small.yaml"
    assert load(path, tmp_path / "runs", {"known_text": "mine.jsonl"}).known_text == "mine.jsonl"
    assert load(path, tmp_path / "runs", {"known_text": None}).known_text == "k.jsonl"


def test_an_option_that_quality_does_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match="quality_options has 'sample': expected samples, batch"):
        written(tmp_path, quality_options={"sample": 3})


@pytest.mark.parametrize("timed", [True, False])
def test_without_speed_no_training_waits_for_its_turn(tmp_path, timed):
    code = "import os; print('SFTLAB_TURN' in os.environ)"
    words = [sys.executable, "-c", code]
    commands = [Command(words, tmp_path / f"{n}.log") for n in range(2)]
    assert sorted(in_turn(commands, timed)) == [0, 1]
    assert {one.log.read_text().strip() for one in commands} == {str(timed)}


def test_the_perplexity_of_known_text_is_a_column_and_speed_is_none(tmp_path, recipe):
    study = written(tmp_path, known_text="texts/k.jsonl", speed=False)
    make = run_writer(recipe, tmp_path)
    for task, tuned in zip(study.tasks, (4.0, 6.0), strict=True):
        folder = make(task.folder.name, lora_r=task.fields["lora_r"], lora_alpha=8, seed=1)
        scores = {
            side: {"value": value, "interval_95": [value - 1, value + 1]}
            for side, value in (("base", 3.0), ("tuned", tuned))
        }
        report = {"adapter_hash": adapter_hash(folder), "held_out": {"dataset": "texts/k.jsonl"}}
        report["scores"] = {"text_perplexity": scores}
        (folder / "eval" / "perplexity-k.json").write_text(json.dumps(report))
    rows, _ = collect(study, {}, allow=True)
    assert [row["tuned known_perplexity"] for row in rows] == [4.0, 6.0]
    assert [row["tokens_per_s"] for row in rows] == [None, None]
    heading, *lines = summary_table(summarise(study, rows))
    column = heading.index("perplexity of known text")
    assert [line[column] for line in lines] == ["4", "6"]
    assert "real tokens/s" not in heading and "perplexity of known text, base" in heading


def test_a_report_shows_the_perplexity_of_text_of_the_runs_own_adapter(
    make, report, capsys, tmp_path
):
    folder = make("a")
    score = {"value": 3.25, "interval_95": [3.0, 3.5]}
    one = {"adapter_hash": adapter_hash(folder), "held_out": {"dataset": "texts/k.jsonl"}}
    one["scores"] = {"text_perplexity": {"base": score, "tuned": score}}
    stale = one | {"adapter_hash": "another", "held_out": {"dataset": "other.jsonl"}}
    (folder / "eval" / "perplexity-k.json").write_text(json.dumps(one))
    (folder / "eval" / "perplexity-other.json").write_text(json.dumps(stale))
    report.main(["--runs", str(folder), "--out", str(tmp_path / "out")])
    assert "stale perplexity of text" in capsys.readouterr().out
    with (tmp_path / "out" / "runs.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["tuned perplexity of k.jsonl"] == "3.25"
    assert not any("other.jsonl" in name for name in row)
