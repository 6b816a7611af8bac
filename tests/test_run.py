"""The run directory: nothing finished is overwritten, nothing unfinished is continued with other settings."""

import json

import pytest
import torch

from sftlab.ran import tf32_products
from sftlab.run import Run, newest_checkpoint, read_run

LAUNCH = {"world_size": 1}
RECIPE = {"learning_rate": 0.1, "overwrite": False}


def started(folder, recipe=None, overwrite=False, world_size=1):
    run = Run(folder, is_main=True)
    checkpoint = run.start(recipe or RECIPE, {"world_size": world_size}, overwrite)
    return run, checkpoint


def checkpoint(folder, step):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text("{}")
    return str(path)


def test_a_finished_run_is_replaced_only_with_overwrite(tmp_path):
    run, _ = started(tmp_path / "r")
    run.adapter.mkdir()
    run.finish("succeeded")
    with pytest.raises(ValueError, match="--overwrite"):
        started(tmp_path / "r")
    assert read_run(tmp_path / "r")["status"] == "succeeded"
    started(tmp_path / "r", overwrite=True)
    assert read_run(tmp_path / "r")["status"] == "running"
    assert not run.adapter.exists()


@pytest.mark.parametrize("status", ["interrupted", "failed", "running"])
def test_an_unfinished_run_continues_from_its_newest_checkpoint(tmp_path, status):
    run, _ = started(tmp_path / "r")
    if status != "running":
        run.finish(status, reason="because")
    checkpoint(tmp_path / "r", 9)
    newest = checkpoint(tmp_path / "r", 10)
    _, found = started(tmp_path / "r")
    record = read_run(tmp_path / "r")
    assert found == newest
    assert record["interruptions"][0]["status"] == status
    assert record["interruptions"][0]["from"] == newest


def test_a_checkpoint_without_a_readable_state_is_not_taken(tmp_path):
    good = checkpoint(tmp_path, 5)
    (tmp_path / "checkpoint-6").mkdir()
    bad = checkpoint(tmp_path, 7)
    (tmp_path / "checkpoint-7" / "trainer_state.json").write_text('{"global_')
    assert bad != newest_checkpoint(tmp_path) == good
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_other_settings_or_another_world_size_are_refused_with_the_difference(tmp_path):
    run, _ = started(tmp_path / "r")
    run.finish("interrupted")
    checkpoint(tmp_path / "r", 3)
    with pytest.raises(ValueError, match=r"learning_rate \(0.1 was, 0.2 is\)"):
        started(tmp_path / "r", {**RECIPE, "learning_rate": 0.2})
    with pytest.raises(ValueError, match=r"world size \(1 was, 2 is\)"):
        started(tmp_path / "r", world_size=2)
    assert started(tmp_path / "r", {**RECIPE, "learning_rate": 0.2}, overwrite=True)[1] is None
    assert not (tmp_path / "r" / "checkpoint-3").exists()


def test_the_first_failure_stands_and_a_finished_run_cannot_fail(tmp_path):
    run, _ = started(tmp_path / "r")
    Run(tmp_path / "r", is_main=False).fail("rank one broke", rank=1)
    run.fail("rank nought was stopped", rank=0)
    record = read_run(tmp_path / "r")
    assert (record["status"], record["reason"], record["failed_rank"]) == ("failed", "rank one broke", 1)
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
