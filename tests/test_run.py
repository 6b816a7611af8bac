"""The run directory: nothing finished is overwritten, nothing unfinished is continued with other
settings.
"""

import json

import pytest
import torch
from run_folders import DATA, RECIPE, checkpoint, started

from sftlab.runs import progress
from sftlab.runs.environment import environment
from sftlab.runs.run_directory import Run, read_run
from sftlab.training.verification import tf32_products


def test_a_job_that_slurm_starts_again_goes_on_though_it_overwrites(tmp_path, monkeypatch):
    recipe = {**RECIPE, "overwrite": True}
    run, _ = started(tmp_path / "r", recipe, overwrite=True)
    checkpoint(tmp_path / "r", 3)
    assert started(tmp_path / "r", recipe, overwrite=True)[1].checkpoint is None
    checkpoint(tmp_path / "r", 3)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert started(tmp_path / "r", recipe, overwrite=True)[1].checkpoint
    run.finish("succeeded")
    assert started(tmp_path / "r", recipe, overwrite=True)[1].checkpoint is None, (
        "what another job has finished"
    )


def test_a_finished_run_is_replaced_only_with_overwrite(tmp_path):
    run, _ = started(tmp_path / "r")
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").write_text("weights")
    run.made.note_files([run.adapter / "adapter_model.safetensors"])
    run.finish("succeeded")
    with pytest.raises(ValueError, match="--overwrite"):
        started(tmp_path / "r")
    assert read_run(tmp_path / "r")["status"] == "succeeded"
    started(tmp_path / "r", overwrite=True)
    assert read_run(tmp_path / "r")["status"] == "running"
    assert not run.adapter.exists()


def test_a_run_without_a_launch_config_is_read(tmp_path):
    run, _ = started(tmp_path / "r")
    record = json.loads(run.path.read_text())
    record["launch"]["precision"] = None  # the recipe's bf16 or fp16 decides it
    run.path.write_text(json.dumps(record))
    assert read_run(tmp_path / "r")["launch"]["precision"] is None


SHORT = RECIPE | {"max_steps": 4, "lr_scheduler_type": "constant", "warmup_steps": 1}


def finished_folder(folder, recipe):
    run, _ = started(folder, recipe)
    checkpoint(folder, 4, recipe=recipe)
    run.finish("succeeded")
    return folder


def test_a_finished_run_is_extended_on_request(tmp_path):
    folder = finished_folder(tmp_path / "r", SHORT)
    longer = SHORT | {"max_steps": 6}
    with pytest.raises(ValueError, match="or --extend with more steps or epochs"):
        started(folder, longer)
    _, start = started(folder, longer, extend=True)
    assert start.checkpoint.endswith("checkpoint-4")
    assert (start.changed, start.warnings) == ([], [])
    assert "4 steps done of 6, 2 left" in start.says[0]
    (stop,) = read_run(folder)["interruptions"]
    assert (stop["status"], stop["step"], stop["changed"]) == ("succeeded", 4, [])
    # killed before its first new checkpoint, it goes on with the same command
    assert started(folder, longer, extend=True)[1].checkpoint == start.checkpoint


@pytest.mark.parametrize(
    "own", [{"lr_scheduler_type": "linear"}, {"lr_scheduler_type": "constant", "warmup_steps": 0.1}]
)
def test_an_extension_says_what_depends_on_the_length(own, tmp_path):
    folder = finished_folder(tmp_path / "r", SHORT | own)
    _, start = started(folder, SHORT | own | {"max_steps": 6}, extend=True)
    assert start.changed[0].startswith("a larger max_steps (4 was, 6 is), on which its ")
    assert "the learning rates until here are those of the shorter run" in start.warnings[0]
    assert read_run(folder)["interruptions"][0]["changed"] == start.changed


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"max_steps": 4}, "has finished max_steps 4: pass a larger --max_steps"),
        ({"max_steps": -1, "num_train_epochs": 9}, "pass a larger --max_steps"),
        ({"max_steps": 6, "dataset_streaming": True}, "read a stream"),
        ({"max_steps": 6, "learning_rate": 0.2}, r"learning_rate \(0.1 was, 0.2 is\)"),
    ],
)
def test_what_is_no_extension_is_refused(own, message, tmp_path):
    folder = finished_folder(tmp_path / "r", SHORT)
    with pytest.raises(ValueError, match=message):
        started(folder, SHORT | own, extend=True)
    with pytest.raises(ValueError, match="both true"):
        started(folder, SHORT, extend=True, overwrite=True)


@pytest.mark.parametrize("status", ["interrupted", "failed", "running"])
def test_an_unfinished_run_continues_from_its_newest_checkpoint(tmp_path, status):
    run, _ = started(tmp_path / "r")
    if status != "running":
        run.finish(status, reason="because")
    checkpoint(tmp_path / "r", 9)
    newest = checkpoint(tmp_path / "r", 10)
    checkpoint(tmp_path / "r", 11, sealed=False)
    progress.Notes(tmp_path / "r").write(14, 3.5)
    _, start = started(tmp_path / "r")
    (stop,) = read_run(tmp_path / "r")["interruptions"]
    assert start.checkpoint == stop["from"] == newest
    assert (stop["status"], stop["step"], stop["steps_done_again"], stop["seconds_done_again"]) == (
        status,
        10,
        4,
        1.5,
    )
    assert start.warnings == stop["set_aside"]
    assert "checkpoint-11 has no manifest.json" in start.warnings[0]


def test_an_interruption_before_the_first_checkpoint_is_one_too(tmp_path):
    started(tmp_path / "r")
    progress.Notes(tmp_path / "r").write(2, 0.5)
    _, start = started(tmp_path / "r")
    (stop,) = read_run(tmp_path / "r")["interruptions"]
    assert start.checkpoint is stop["from"] is None
    assert (stop["steps_done_again"], stop["seconds_done_again"]) == (2, 0.5)
    started(tmp_path / "r", {**RECIPE, "learning_rate": 0.2})
    assert read_run(tmp_path / "r")["interruptions"] == [], "another run"


def test_other_settings_or_another_world_size_are_refused_with_the_difference(tmp_path):
    run, _ = started(tmp_path / "r")
    run.finish("interrupted")
    checkpoint(tmp_path / "r", 3)
    other = {**RECIPE, "learning_rate": 0.2}
    with pytest.raises(ValueError, match=r"learning_rate \(0.1 was, 0.2 is\).*--resume_anyway"):
        started(tmp_path / "r", other)
    with pytest.raises(ValueError, match=r"world size \(1 was, 2 is\)"):
        started(tmp_path / "r", world_size=2)
    assert read_run(tmp_path / "r")["status"] == "interrupted"
    assert started(tmp_path / "r", {**RECIPE, "output_dir": "moved", "overwrite": True})[
        1
    ].checkpoint
    start = started(tmp_path / "r", other, anyway=True)[1]
    (*_, stop) = read_run(tmp_path / "r")["interruptions"]
    assert start.checkpoint
    assert stop["changed"] == ["learning_rate (0.1 was, 0.2 is)"]
    assert "continues with learning_rate (0.1 was, 0.2 is): it may differ" in start.warnings[0]
    assert started(tmp_path / "r", other, overwrite=True)[1].checkpoint is None
    assert not (tmp_path / "r" / "checkpoint-3").exists()


def test_other_versions_are_refused_and_other_hardware_is_said(tmp_path, monkeypatch):
    started(tmp_path / "r")
    checkpoint(tmp_path / "r", 3)
    now = environment()
    later = now | {"versions": now["versions"] | {"torch": "9.9"}}
    monkeypatch.setattr("sftlab.runs.run_directory.environment", lambda: later)
    with pytest.raises(ValueError, match=r"versions torch \(.* was, '9.9' is\)"):
        started(tmp_path / "r")
    elsewhere = now | {"hardware": now["hardware"] | {"cpu_cores": 999}}
    monkeypatch.setattr("sftlab.runs.run_directory.environment", lambda: elsewhere)
    assert "hardware cpu_cores" in started(tmp_path / "r")[1].warnings[0]


def test_other_data_are_refused_once_they_are_read(tmp_path):
    started(tmp_path / "r")
    checkpoint(tmp_path / "r", 3)
    launch = {"world_size": 1}
    run = Run(tmp_path / "r", is_main=True)
    start = run.look(RECIPE, launch, overwrite=False)
    run.check(start, DATA, anyway=False)
    other = {"data": {"train": {"rows": 10, "fingerprint": "def"}}, "template": {"hash": "uvw"}}
    with pytest.raises(
        ValueError, match=r"data train fingerprint \('abc' was, 'def' is\); template hash"
    ):
        run.check(start, other, anyway=False)
    assert read_run(tmp_path / "r")["interruptions"] == [], (
        "nothing is written before all is checked"
    )
    run.check(start, other, anyway=True)
    run.begin(start, RECIPE, launch, **other)
    assert (
        "data train fingerprint ('abc' was, 'def' is)"
        in read_run(tmp_path / "r")["interruptions"][-1]["changed"]
    )
    begun, start = started(tmp_path / "r", overwrite=True)
    begun.check(start, other, anyway=False)


def test_the_first_failure_stands_and_a_finished_run_cannot_fail(tmp_path):
    run, _ = started(tmp_path / "r")
    Run(tmp_path / "r", is_main=False).fail("rank one broke", rank=1)
    run.fail("rank nought was stopped", rank=0)
    record = read_run(tmp_path / "r")
    assert (record["status"], record["reason"], record["failed_rank"]) == (
        "failed",
        "rank one broke",
        1,
    )
    other, _ = started(tmp_path / "s")
    other.finish("succeeded")
    other.fail("late", rank=0)
    assert read_run(tmp_path / "s")["status"] == "succeeded"


def test_the_record_holds_versions_hardware_and_commit(tmp_path):
    started(tmp_path / "r")
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert record["versions"]["torch"]
    assert record["hardware"]["cpu_cores"] >= 1
    assert "git_commit" in record
    assert not list((tmp_path / "r").glob(".run.json*"))


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"no run\.json"):
        read_run(tmp_path)


def test_tf32_is_seen_where_it_was_set_in_torch_s_newer_way():
    before = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = "tf32"
        assert tf32_products() is True
        torch.backends.fp32_precision = "ieee"
        assert tf32_products() is False
    finally:
        torch.backends.fp32_precision = before
