"""A study evaluates its runs as its file says, and shows what the tuning forgot."""

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from report_runs import run_writer
from small_studies import SCRIPT, TWO, ended

from sftlab.comparison.study_claims import claims
from sftlab.comparison.study_file import load
from sftlab.comparison.study_summary import collect, summarise
from sftlab.comparison.study_tables import claims_table, summary_table
from sftlab.comparison.study_tasks import begin
from sftlab.comparison.timed_turns import Command, environment_beside, in_turn
from sftlab.runs.run_directory import adapter_hash

STUDY = {
    "recipe": "recipes/demo/attn_r16.yaml",
    "launch": "cpu",
    "axis": ["lora_r"],
    "seeds": [1],
    "cells": TWO,
    "quality": True,
}


KNOWN, SCORED = ["quality", "--dataset_name", "k.jsonl"], {"scores": {}}


def written(tmp_path, **more):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(STUDY | more, sort_keys=False), encoding="utf-8")
    return load(path, tmp_path / "runs", {})


@pytest.mark.parametrize(
    ("more", "found", "asked"),
    [
        ({}, ({}, []), [["quality"]]),
        ({"quality_options": {"samples": 20}}, ({}, []), [["quality", "--samples=20"]]),
        ({"known_text": "k.jsonl"}, ({}, []), [["quality"], KNOWN]),
        ({"known_text": "k.jsonl"}, (SCORED, []), [KNOWN]),
        ({"known_text": "k.jsonl"}, (SCORED, ["k.jsonl"]), []),
        ({"known_text": "k.jsonl"}, (SCORED, ["o.jsonl"]), [KNOWN]),
        ({"quality": False, "known_text": "k.jsonl"}, ({}, []), []),
        ({"harness": {"tasks": ["a", "b"]}}, (SCORED, []), [["harness", "--tasks", "a,b"]]),
        (
            {"harness": {"tasks": ["a", "b"], "limit": 20, "files": ["a_test=f"]}},
            (SCORED, [], [("a", 20), ("b", None)]),
            [["harness", "--tasks", "b", "--limit=20", "--files", "a_test=f"]],
        ),
    ],
)
def test_what_a_run_lacks_is_evaluated(tmp_path, monkeypatch, more, found, asked):
    study, calls = written(tmp_path, **more), []

    def run(command, **options):
        calls.append([Path(command[1]).stem, *command[4:]])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(SCRIPT.subprocess, "run", run)
    texts = [{"held_out": {"dataset": name}} for name in found[1]]
    tasks = [{"task": name, "limit": limit} for name, limit in (found[2:] or [[]])[0]]
    results = SimpleNamespace(quality=found[0], texts=texts, tasks=tasks)
    monkeypatch.setattr(SCRIPT, "read_results", lambda folder: results)
    for task in study.tasks:
        (task.folder / "adapter").mkdir(parents=True)
    assert SCRIPT.score_together(study, study.tasks, at_once=1) == []
    assert calls == asked * len(study.tasks)


def test_an_evaluation_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    study = written(tmp_path)
    fails = lambda command, **_: SimpleNamespace(returncode="r4" in command[3])  # noqa: E731
    monkeypatch.setattr(SCRIPT.subprocess, "run", fails)
    empty = SimpleNamespace(quality={}, texts=[], tasks=[])
    monkeypatch.setattr(SCRIPT, "read_results", lambda _: empty)
    for task in study.tasks:
        (task.folder / "adapter").mkdir(parents=True)
    unscored = SCRIPT.score_together(study, study.tasks, at_once=2)
    assert [task.cell for task in unscored] == ["r4"]


def test_the_command_line_names_a_text_that_the_base_model_knew(tmp_path):
    written(tmp_path, known_text="k.jsonl")
    path = tmp_path / "small.yaml"
    assert load(path, tmp_path / "runs", {"known_text": "mine.jsonl"}).known_text == "mine.jsonl"
    assert load(path, tmp_path / "runs", {"known_text": None}).known_text == "k.jsonl"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"quality_options": {"sample": 3}},
            "quality_options has 'sample': expected samples, batch",
        ),
        ({"harness": {"task": ["a"]}}, "harness has 'task': expected tasks, limit"),
        ({"harness": {"tasks": "a"}}, "harness, tasks: got 'a', expected a list of lm-eval tasks"),
        ({"quality_options": {"samples": -4}}, "samples: got -4, expected a whole number from 0"),
        ({"quality_options": {"batch_size": "x"}}, "batch_size: got 'x', expected a whole number"),
        ({"harness": {"tasks": ["a"], "limit": 0}}, "limit: got 0, expected a whole number from 1"),
        ({"harness": {"tasks": ["a"], "files": "/nope"}}, "files: got '/nope', expected a list"),
        ({"harness": {"limit": 3}}, "harness, tasks: got None, expected a list of lm-eval tasks"),
    ],
)
def test_an_option_that_an_evaluation_does_not_have_is_refused(tmp_path, more, said):
    with pytest.raises(ValueError, match=said):
        written(tmp_path, **more)


@pytest.mark.parametrize("status", [-2, -15, 130, 143])
def test_an_evaluation_that_is_told_to_stop_stops_the_study(tmp_path, monkeypatch, capsys, status):
    study = written(tmp_path)
    for task in study.tasks:
        begin(task)
        ended(task.folder, "succeeded")
        (task.folder / "adapter").mkdir()
    monkeypatch.setattr(
        SCRIPT.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=status)
    )
    with pytest.raises(SystemExit) as stopped:
        SCRIPT.main([str(tmp_path / "small.yaml"), "--runs", str(tmp_path / "runs")])
    assert stopped.value.code == 128 + {2: 2, 15: 15, 130: 2, 143: 15}[abs(status)]
    assert "start the same command again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--known_text", "nowhere.jsonl"], "known_text nowhere.jsonl: there is no such file"),
        (["--task", "2"], "--task 2: the study has tasks 0 to 1"),
        (["--at_once", "0"], "--at_once 0: expected 1 or more"),
    ],
)
def test_what_is_asked_in_vain_is_refused_before_a_dry_run_too(tmp_path, words, said):
    written(tmp_path)
    with pytest.raises(SystemExit, match=said):
        SCRIPT.main([str(tmp_path / "small.yaml"), "--dry-run", *words])


def test_processes_beside_one_another_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr("sftlab.comparison.timed_turns.cpu_cores", lambda: 8)
    threads = [environment_beside(n, timed=False).get("OMP_NUM_THREADS") for n in (1, 2, 3, 20)]
    assert threads == [None, "4", "2", "1"]
    in_turns = environment_beside(2, timed=True)
    assert "OMP_NUM_THREADS" not in in_turns and in_turns["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environment_beside(2, timed=False)["OMP_NUM_THREADS"] == "3"


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


def test_the_scores_of_lm_eval_tasks_are_columns_and_are_compared(tmp_path, recipe):
    study = written(tmp_path, seeds=[1, 2, 3], harness={"tasks": ["quiz"], "limit": 20})
    make = run_writer(recipe, tmp_path)
    for task in study.tasks:
        seed, rank = task.fields["seed"], task.fields["lora_r"]
        folder = make(task.folder.name, lora_r=rank, lora_alpha=2 * rank, seed=seed)
        tuned = 0.1 * rank + 0.01 * seed + (0.001 if (rank, seed) == (2, 2) else 0)
        score = {
            side: {"value": value, "interval_95": [0.0, 1.0]}
            for side, value in (("base", 0.1), ("tuned", tuned))
        }
        entry = {"task": "quiz", "chat_template": True, "limit": 20, "few_shot": 0}
        entry |= {"main_metric": "acc,none", "metrics": {"acc,none": score}}
        entries = [entry | {"adapter_hash": adapter_hash(folder)}]
        (folder / "eval" / "harness.json").write_text(json.dumps({"entries": entries}))
    rows, _ = collect(study, {}, allow=True)
    heading, r4, r2 = summary_table(summarise(study, rows))
    column = heading.index("quiz 0-shot first 20")
    assert heading[column - 1] == "quiz 0-shot first 20, base"
    assert (r4[column], r2[column]) == ("0.42 [0.41, 0.43]", "0.221 [0.21, 0.23]")
    (claim,) = [one for one in claims(study, rows) if "quiz" in one["score"]]
    assert (claim["score"], claim["word"]) == ("tuned quiz 0-shot first 20", "worse")
    assert claims_table([claim])[1][1] == "quiz 0-shot first 20"


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
