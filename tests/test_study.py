"""A study trains its cells once, keeps what is done, and refuses confounded cells."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time

import fork_server
import pytest
import yaml
from conftest import ROOT, read, short_fields
from small_studies import SCRIPT, TWO, ended

from sftlab.comparison.study_file import check_comparable, load
from sftlab.comparison.study_tasks import begin, is_done


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


def start(path, tmp_path, *more, python=None, **kwargs):
    command = [
        python or fork_server.python(),
        "recipes/study.py",
        str(path),
        "--runs",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "out"),
        *more,
    ]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def test_a_study_that_is_told_to_stop_lets_the_training_save(write, tmp_path):
    path = write({"r2": {"lora_r": 2, "lora_alpha": 4, "max_steps": 100000}})
    process = start(path, tmp_path)
    run = tmp_path / "runs" / "r2-1" / "run.json"
    while not list(run.parent.glob("checkpoint-*/trainer_state.json")):
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 128 + signal.SIGTERM
    assert err.strip().endswith("stopped: start the same command again to go on")
    assert json.loads(run.read_text())["status"] == "interrupted"


@pytest.mark.long
def test_a_study_killed_in_a_cell_ends_as_if_it_had_not_been(write, tmp_path):
    undisturbed = TWO["r2"] | {"save_total_limit": 9}  # another name for the same training
    wrong = TWO["r2"] | {"lora_modules_to_save": ["no_layer"]}
    axis = ["lora_r", "lora_modules_to_save"]
    path = write({**TWO, "r2 undisturbed": undisturbed, "wrong": wrong}, axis=axis)
    begun = start(path, tmp_path, start_new_session=True)
    second = tmp_path / "runs" / "r2-1"
    while not (second / "run.json").is_file():
        assert begun.poll() is None, begun.communicate()
        time.sleep(0.05)
    os.killpg(begun.pid, signal.SIGKILL)
    begun.wait()
    # torchrun gives each rank a session of its own
    with contextlib.suppress(ProcessLookupError):
        os.kill(json.loads((second / "run.json").read_text())["host_pid"][1], signal.SIGKILL)
    first = (tmp_path / "runs" / "r4-1" / "run.json").stat().st_mtime_ns
    code, out, err = finish(start(path, tmp_path))
    assert (code, err.splitlines()[-1]) == (1, "error: no result of 1 of 4: wrong, 1"), err
    assert (tmp_path / "runs" / "r4-1" / "run.json").stat().st_mtime_ns == first, (
        "what was done is kept"
    )
    again = json.loads((second / "run.json").read_text(encoding="utf-8"))
    assert (again["status"], again["interruptions"]) == ("succeeded", [])
    assert "[1/4] r4, 1: succeeded" in out and "done before" in out
    assert columns(tmp_path, "status") == ["succeeded", "succeeded", "succeeded", "failed"]
    assert "lora_modules_to_save" in columns(tmp_path, "reason")[3]
    for column in ("runs", "train_loss", "validation_loss", "trainable_parameters"):
        assert len(set(columns(tmp_path, column)[1:3])) == 1, column
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "study.md",
        "runs.csv",
        "summary.csv",
        "small.png",
        "small.svg",
    }


def columns(folder, name):
    with (folder / "out" / "summary.csv").open(encoding="utf-8") as file:
        return [row[name] for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    "cells, more, said",
    [
        (
            {**TWO, "r8": {"lora_r": 8, "lora_alpha": 16, "learning_rate": 1e-5}},
            {},
            "learning_rate",
        ),
        ({**TWO, "r8": {"lora_r": 8, "lora_alpha": 8}}, {}, "lora_scale"),
        ({**TWO, "r8": {"lora_r": 8, "lora_alpha": 16, "weight_decay": 0.1}}, {}, "weight_decay"),
        (TWO, {"axis": ["lora_rank"]}, "did you mean 'lora_r'"),
        (TWO, {"launch": "gpu"}, "there is no launch config accelerate_configs/gpu.yaml"),
        (TWO, {"launch": "a\nb.yaml"}, "there is no launch config a b.yaml"),
        (TWO, {"recipe": "recipes/none.yaml"}, "recipe recipes/none.yaml not found"),
        (TWO, {"repeat": 3}, "repeat is nothing that a study knows"),
        (TWO, {"reference": "r8"}, "the reference r8 is none of the cells"),
        (None, {}, "is no study"),
        (TWO, {"fields": {"output_dir": "runs/mine"}}, "output_dir is the study's own"),
        ({"r 4": TWO["r4"], "r_4": TWO["r2"]}, {}, "r_4, 1 and r 4, 1 would both be kept in"),
        (TWO, {"seeds": [1, 2], "fields": {"seed": 3}}, "--seed would say nothing"),
        (TWO, {"seeds": 3}, "seeds is 3: expected a list"),
        (TWO, {"repeats": "3"}, "repeats is '3': expected a whole number"),
        (TWO, {"repeats": 1_000_000}, "repeats is 1000000: expected a whole number from 1 to"),
        (TWO, {"repeats": True}, "repeats is True: expected a whole number from 1 to"),
        (TWO, {"seeds": [1, 2.5]}, "seeds holds 2.5: expected whole numbers"),
        (["r4", "r2"], {}, "cells is ['r4', 'r2']: expected lines of name: value"),
        ({"r4": 4}, {}, "r4 of cells is 4: expected fields"),
        pytest.param("x" * 9000, {}, f"{'x' * 250} ... ", id="endless"),
        (TWO, {"flags": {"mixed_precision": "bf17"}}, "mixed_precision is bf17: expected one of"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    write, tmp_path, cells, more, said
):
    with pytest.raises(SystemExit) as refused:
        SCRIPT.main([str(write(cells, **more)), "--runs", str(tmp_path / "runs")])
    assert str(refused.value).startswith("error: ") and said in str(refused.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "path", sorted(p.name for p in (ROOT / "recipes" / "studies").glob("*.yaml"))
)
def test_the_studies_are_commands_of_cells_equal_but_for_their_axis(path, capsys):
    SCRIPT.main([str(ROOT / "recipes" / "studies" / path), "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    commands = [line for line in lines if not line.startswith("# then ")]
    assert len(commands) >= 9 and len(set(commands)) == len(commands)
    assert all(
        line.startswith("accelerate launch --config_file accelerate_configs/") for line in commands
    )


def test_what_needs_more_gpus_than_there_are_is_a_row(write, tmp_path):
    path = write(
        {"1 GPU": {"processes": 1}, "64 GPUs": {"processes": 64}}, axis=["world_size"], launch="ddp"
    )
    code, out, err = finish(start(path, tmp_path, "--global_batch_size", "64"))
    assert (code, err.splitlines()[-1]) == (1, "error: no result of 2 of 2: 1 GPU, 1; 64 GPUs, 1")
    assert columns(tmp_path, "status")[1] == "not run"
    assert "it needs 64 GPUs" in columns(tmp_path, "reason")[1] and "64 GPUs, 1: not run" in out
    before = columns(tmp_path, "reason")
    with pytest.raises(SystemExit, match="no result of 2 of 2"):
        SCRIPT.main(
            [
                str(path),
                "--runs",
                str(tmp_path / "runs"),
                "--out",
                str(tmp_path / "out"),
                "--global_batch_size=64",
                "--no_train",
            ]
        )
    assert columns(tmp_path, "status") == ["not run", "not run"]
    assert columns(tmp_path, "reason") == ["not yet", before[1]]
    assert "no_train" not in (tmp_path / "out" / "study.md").read_text(), (
        "the command is the trainings'"
    )


@pytest.mark.parametrize(
    "status, reason, done",
    [
        ("succeeded", None, True),
        ("failed", "OutOfMemoryError: CUDA out of memory", True),
        ("failed", "ValueError: no such file", False),
        ("interrupted", "signal 15 at step 3 of 6", False),
        ("running", None, False),
    ],
)
def test_what_is_trained_again(write, tmp_path, status, reason, done):
    task = load(write(TWO), tmp_path / "runs", {}).tasks[0]
    begin(task)
    assert not is_done(task)
    ended(task.folder, status, reason)
    assert is_done(task) is done
    other = load(
        write({"r4": {"lora_r": 4, "lora_alpha": 8, "seed": 7}}), tmp_path / "runs", {}
    ).tasks[0]
    assert other.folder == task.folder
    with pytest.raises(ValueError, match=r"holds r4, 1 with other settings \(command"):
        is_done(other)
    with pytest.raises(SystemExit, match=r"other settings \(command"):
        SCRIPT.main(
            [str(write(TWO)), "--runs", str(tmp_path / "runs"), "--max_steps", "9", "--no_train"]
        )
    for damaged in ("", "[]", "{"):
        (task.folder / "task.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"task\.json"):
            is_done(task)
    (task.folder / "task.json").unlink()
    with pytest.raises(ValueError, match="not of this study"):
        is_done(task)


def test_a_recipe_or_launch_config_that_changed_is_noticed(write, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    text = (ROOT / "recipes" / "demo" / "attn_r16.yaml").read_text()
    recipe.write_text(text)
    (task, _) = load(write(TWO, recipe=str(recipe)), tmp_path / "runs", {}).tasks
    begin(task)
    ended(task.folder, "succeeded")
    recipe.write_text(text + "# a comment\n")
    assert is_done(task)
    recipe.write_text(text + "weight_decay: 0.5\n")
    with pytest.raises(ValueError, match=r"other settings \(recipe\)"):
        is_done(task)


def test_repeats_of_one_seed_are_trainings_of_their_own(write, tmp_path):
    study = load(write(TWO, repeats=3), tmp_path, {"seed": "7"})
    assert (
        len({task.name for task in study.tasks}) == len({task.folder for task in study.tasks}) == 6
    )
    assert {task.fields["seed"] for task in study.tasks} == {"7"}


def test_yaml_s_no_is_accelerate_s_no(write, tmp_path):
    path = write(TWO)
    path.write_text(path.read_text() + "flags: {mixed_precision: no}\n")
    study = load(path, tmp_path, {})
    check_comparable(study)
    assert "--mixed_precision no" in " ".join(study.tasks[0].command())
    path.write_text("cells: [")
    with pytest.raises(ValueError, match=r"small.yaml is not YAML: while parsing"):
        load(path, tmp_path, {})


def test_memory_that_ran_out_beside_others_says_nothing_of_the_cell(
    write, tmp_path, monkeypatch, capsys
):
    """A training that has room alone, one that has none, and one with room for both."""

    def fake(task):
        ends = {"r2": "'SFTLAB_TURN' in os.environ", "r4": "True", "r8": "False"}[task.cell]
        failed = "{'status': 'failed', 'reason': 'OutOfMemoryError: CUDA'}"
        ended = f"{failed} if {ends} else {{'status': 'succeeded', 'reason': None}}"
        record = f"{{'recipe': {{}}, 'launch': {{}}, **({ended})}}"
        path = f"{task.folder}/run.json"
        script = f"import json, os; open({path!r}, 'w').write(json.dumps({record}))"
        return [sys.executable, "-c", script]

    monkeypatch.setattr(SCRIPT, "python_command", fake)
    # what the stand-in writes is no whole record
    monkeypatch.setattr("sftlab.comparison.study_tasks.read_run", read)
    study = load(write({**TWO, "r8": {"lora_r": 8, "lora_alpha": 16}}), tmp_path / "runs", {})
    tasks = study.tasks
    assert SCRIPT.train(study, tasks, at_once=3) == {}
    assert [SCRIPT.result(task).split(" ")[0] for task in tasks] == [
        "out",
        "succeeded",
        "succeeded",
    ]
    assert all(map(is_done, tasks))
    assert (
        "out of memory beside others, so each alone again: r4, 1, r2, 1" in capsys.readouterr().out
    )
    begin(tasks[0], beside=2)
    assert not is_done(tasks[0]), "a study that is broken off there trains it anew"


def test_studies_of_no_training_at_once_are_refused(write, tmp_path):
    code, _, err = finish(start(write(TWO), tmp_path, "--at_once", "0"))
    assert (code, err) == (1, "error: --at_once 0: expected 1 or more trainings\n")
