"""eval/report.py prints one row a run, and names what failed or is missing."""

import json
import math
import os
import re
import socket
import subprocess
import sys

from conftest import ROOT
from report_runs import GPU, read_csv, refused, run_report, table_row

from sftlab.comparison.run_results import outcome
from sftlab.evaluation.text_metrics import NAMES


def test_runs_that_failed_are_rows(make, report, capsys, tmp_path):
    nan = [[5, 5.2], [10, math.nan]]
    made = {
        "ok": {},
        "memory": {
            "status": "failed",
            "reason": "OutOfMemoryError: CUDA out of memory",
            "ran": None,
            "measured": None,
        },
        "nan": {
            "status": "failed",
            "reason": "RuntimeError: diverged: the mean is nan",
            "losses": nan,
        },
        "rising": {"losses": [[5, 5.2], [10, 8.1]]},
        "noisy": {"losses": [[5, 5.2], [10, 5.3]]},
        "broken": {
            "status": "failed",
            "reason": "KeyError: 'x | y' in /home/me/data/rows.jsonl",
            "measured": None,
        },
        "stopped": {"status": "interrupted", "reason": "signal 15 at step 30 of 60"},
        "going": {"status": "running", "ran": None, "measured": None},
    }
    for rank, (name, top) in enumerate(made.items(), start=1):
        make(name, wrong=3 if name == "ok" else None, lora_r=rank, lora_alpha=2 * rank, top=top)
    printed = run_report(report, capsys, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    text, rows = (tmp_path / "out" / "report.md").read_text(), read_csv(tmp_path / "out")
    statuses = {
        "ok": "succeeded",
        "memory": "out of memory",
        "nan": "diverged",
        "rising": "diverged",
        "noisy": "succeeded",
        "broken": "failed",
        "stopped": "interrupted",
        "going": "running",
    }
    assert {name: row["status"] for name, row in rows.items()} == statuses
    assert rows["memory"]["tokens_per_s"] == ""
    assert "| diverged: the loss is nan at step 10 |" in table_row(text, "nan")
    assert "grew from 5.2 to 8.1" in table_row(text, "rising")
    assert "KeyError: 'x \\| y' in rows.jsonl" in table_row(text, "broken")
    assert all(name in printed for name in made)
    assert "not compared" not in printed  # one run with scores: nothing is compared
    svg = (tmp_path / "out" / "speed.svg").read_text()
    assert re.search(r">\s*out of memory\s*<", svg)


def test_a_run_whose_process_is_gone_is_said_to_be():
    run = {"status": "running", "host_pid": [socket.gethostname(), 2**22 + 1]}
    assert outcome(run) == ("running", "its process is gone: start it again to continue")
    assert outcome(run | {"host_pid": [socket.gethostname(), os.getpid()]}) == ("running", "")


def test_figures_of_the_csv_are_those_of_the_records(make, report, capsys, tmp_path):
    peaks = [{"allocated_gb": 1.5, "reserved_gb": 9}, {"allocated_gb": 2.25, "reserved_gb": 9}]
    folder = make(
        "run", measured={"tokens_per_s": 7834.512345678901, "peak_memory": peaks}, hardware=GPU
    )
    run_report(report, capsys, "--runs", folder, "--out", tmp_path / "out")
    row = read_csv(tmp_path / "out")["run"]
    run = json.loads((folder / "run.json").read_text())
    for key in (
        "tokens_per_s",
        "rows_per_s",
        "share_of_limit",
        "train_seconds",
        "train_loss",
        "validation_loss",
    ):
        assert float(row[key]) == run["measured"][key], key
    assert (row["peak_memory_gb"], row["peak_memory_is"]) == ("2.25", "allocated")
    assert row["trainable_parameters"] == "16896"
    scores = json.loads((folder / "eval" / "quality.json").read_text())["scores"]
    assert scores.keys() == NAMES.keys() - {"final_number"}  # no reference has a `#### n`
    for score, one in scores.items():
        for side in ("base", "tuned"):
            found = [float(row[f"{side} {score}{end}"]) for end in ("", " low", " high")]
            assert found == [one[side]["value"], *one[side]["interval_95"]], (side, score)


def test_speed_of_replicas_has_a_range(make, report, capsys, tmp_path):
    for seed, speed in ((1, 7000.0), (2, 7700.0)):
        make(f"seed{seed}", seed=seed, measured={"tokens_per_s": speed})
    printed = run_report(report, capsys, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    assert "axis: seed (inferred)" in printed
    assert "alike but for the seed, seed1, seed2: 7,000 to 7,700 real tokens/s" in printed


def test_what_a_user_types(make, report, tmp_path):
    for rank in (8, 16):
        make(f"r{rank}", lora_r=rank, lora_alpha=2 * rank)
    command = [sys.executable, "eval/report.py", "--runs", str(tmp_path / "runs"), "--out"]
    done = subprocess.run(
        [*command, str(tmp_path / "one")], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "axis: lora_r (inferred)" in done.stdout
    assert (
        "python eval/report.py --runs runs --out one"
        in (tmp_path / "one" / "report.md").read_text()
    )
    report.main([*command[2:], str(tmp_path / "two")])
    names = {
        f"{plot}.{kind}"
        for plot in ("speed", "memory", "losses", "quality")
        for kind in ("png", "svg")
    }
    assert {path.name for path in (tmp_path / "one").iterdir()} == names | {"report.md", "runs.csv"}
    for name in names | {"runs.csv"}:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), (
            name
        )
    wrong = subprocess.run(
        [*command, "x", "--axis", "lora_rr"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("error: --axis lora_rr")
    assert "did you mean 'lora_r'?" in wrong.stderr


def test_bad_input(make, report, tmp_path):
    folder, out = make("a"), tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no run in" in refused(report, "--runs", empty, "--out", out)
    assert "no run in" in refused(report, "--runs", tmp_path / "nowhere", "--out", out)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "runs.csv").write_text("mine")
    assert "has no report.md, but runs.csv" in refused(report, "--runs", folder, "--out", foreign)
    assert (foreign / "runs.csv").read_text() == "mine"
    error = refused(report, "--runs", folder, "--reference", "runs/elsewhere", "--out", out)
    assert "--reference runs/elsewhere: not among the runs" in error
    for name, content, said in (
        ("eval/quality.jsonl", "{", "quality.jsonl is not what"),
        ("eval/quality.json", "[]", "expected a JSON object"),
        ("eval/quality.json", "{", "quality.json cannot be read: it is not JSON"),
        ("run.json", '{"status": "succeeded"}', "run.json has no recipe, expected an object"),
        ("run.json", "{", "run.json cannot be read: it is not JSON"),
    ):
        (folder / name).write_text(content)
        assert said in refused(report, "--runs", folder, "--out", out)
    assert not out.exists()


def test_runs_of_the_same_name_are_told_apart(make, report, capsys, tmp_path):
    make("a", wrong=None)
    make("b", wrong=None)
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / "runs" / name).rename(tmp_path / name / "run")
    run_report(
        report,
        capsys,
        "--runs",
        tmp_path / "a",
        tmp_path / "b",
        tmp_path / "a",
        "--out",
        tmp_path / "out",
    )
    assert list(read_csv(tmp_path / "out")) == ["a/run", "b/run"]
