"""What fails or stops after the last step leaves what was trained, and says how to go on.

Clocks that go back and stopped processes lose nothing.
"""

import json
import os
import signal
import subprocess
import time

import pytest
from conftest import ROOT, launch_command, read
from run_folders import put, snapshot

from sftlab.runs import progress
from sftlab.runs.checkpoint_manifest import in_order
from sftlab.runs.run_directory import adapter_hash
from sftlab.training import save_adapter
from sftlab.training.trainer import LabTrainer


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_an_adapter_that_cannot_be_saved_is_kept_in_a_checkpoint(
    fields, tmp_path, monkeypatch, train_here, trained_here, strategy
):
    own = {**fields, "max_steps": "3", "save_strategy": strategy, "save_steps": "3"}
    with monkeypatch.context() as patch:
        patch.setattr(save_adapter, "sync_tree", failing(PermissionError(13, "Permission denied")))
        done = train_here(own)
    assert done.returncode
    assert "Traceback" not in done.stderr
    *_, last = done.stderr.strip().splitlines()
    assert last.startswith("error: saving the adapter failed after the last step (")
    assert "start the same command again: it continues from checkpoint-3" in last
    assert read(tmp_path / "run")["status"] == "failed"
    again = trained_here(own)
    assert "continues from checkpoint-3: 3 steps done of 3, 0 left" in again.stdout
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "run" / ".adapter").exists()


def test_a_validation_that_fails_leaves_the_adapter_and_is_done_again(
    fields, tmp_path, monkeypatch, train_here, trained_here
):
    own = {**fields, "max_steps": "3", "save_strategy": "no"}
    with monkeypatch.context() as patch:
        patch.setattr(LabTrainer, "validation", failing(RuntimeError("out of memory")))
        done = train_here(own)
    assert "error: measuring the validation loss failed after the last step" in done.stderr
    assert "The adapter is saved in" in done.stderr and "--overwrite" in done.stderr
    before = adapter_hash(tmp_path / "run")
    refused = train_here(own)
    assert "was trained by a run that failed, and there is no checkpoint" in refused.stderr
    assert adapter_hash(tmp_path / "run") == before
    trained_here({**own, "overwrite": "true"})


def test_a_loss_beyond_every_perplexity_is_no_failure(fields, tmp_path, monkeypatch, trained_here):
    monkeypatch.setattr("sftlab.training.trainer.nats_per_token", lambda rows: 12_000.0)
    trained_here({**fields, "max_steps": "2"})
    measured = read(tmp_path / "run")["measured"]
    assert (measured["validation_loss"], measured["validation_perplexity"]) == (
        12_000,
        float("inf"),
    )


def test_files_of_others_in_the_adapter_s_folder_stay(fields, tmp_path, trained_here):
    put(tmp_path / "run", "log")
    trained_here({**fields, "max_steps": "2", "save_adapter": "false"})
    record = read(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    put(tmp_path / "run", "adapter/mine.txt", "adapter/README.md", "README.md")
    trained_here({**fields, "max_steps": "2"})
    after = snapshot(tmp_path / "run")
    assert after["adapter/mine.txt"] == b"mine: adapter/mine.txt"
    assert after["adapter/README.md-not-of-this-run"] == b"mine: adapter/README.md"
    assert after["README.md"] == b"mine: README.md"
    assert "adapter/adapter_model.safetensors" in after


def test_a_signal_while_the_adapter_is_saved_is_too_late(
    fields, tmp_path, monkeypatch, trained_here
):
    whole = LabTrainer.save_model

    def saving(self, folder=None, **kwargs):
        if str(folder).endswith(".adapter"):
            os.kill(os.getpid(), signal.SIGTERM)
        whole(self, folder, **kwargs)

    monkeypatch.setattr(LabTrainer, "save_model", saving)
    trained_here({**fields, "max_steps": "2"})
    assert read(tmp_path / "run")["status"] == "succeeded"
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_clock_that_goes_back_makes_no_time_negative(
    fields, tmp_path, monkeypatch, train_here, trained_here
):
    real, began = time.time, time.time()
    monkeypatch.setattr(time, "time", lambda: began - 100 * (real() - began))
    own = {**fields, "max_steps": "6", "save_steps": "3"}
    trained_here(own)
    record = read(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    monkeypatch.setattr(time, "time", lambda: began - 86_400)
    trained_here(own)
    record = read(tmp_path / "run")

    def negative(value, key=""):
        if isinstance(value, dict):
            return [one for name, it in value.items() for one in negative(it, f"{key}.{name}")]
        if isinstance(value, list):
            return [one for it in value for one in negative(it, key)]
        timed = key.endswith(("_s", "seconds", "per_s"))
        return [key] if timed and value is not None and value < 0 else []

    assert negative(record["measured"]) + negative(record["interruptions"]) == []
    assert [step for step, _ in record["losses"]] == list(range(1, 7))
    assert in_order(tmp_path / "run")[-1].name == "checkpoint-6"
    assert progress.read(tmp_path / "run").seconds > 0


def started_process(fields):
    return subprocess.Popen(
        launch_command("cpu", {**fields, "disable_tqdm": "true"}),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_stopped_process_goes_on_and_one_killed_while_it_saves_is_continued(
    fields, tmp_path, trained_here
):
    run, own = tmp_path / "run", {**fields, "max_steps": "60", "save_steps": "30"}
    process = started_process(own)
    for line in process.stdout:
        if "'loss'" in line:
            break
    worker = read(run)["host_pid"][1]
    os.kill(worker, signal.SIGSTOP)
    time.sleep(0.3)
    stopped_at = progress.read(run).step
    time.sleep(0.3)
    assert progress.read(run).step == stopped_at
    os.kill(worker, signal.SIGCONT)
    deadline = time.monotonic() + 120
    while not (run / ".adapter").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    os.kill(worker, signal.SIGKILL)
    process.communicate()
    if read(run)["status"] == "running":
        said = trained_here(own).stdout
        assert "continues from checkpoint-60: 60 steps done of 60, 0 left" in said
    assert read(run)["status"] == "succeeded"
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert not (run / ".adapter").exists()
