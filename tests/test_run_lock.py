"""Two launches into one folder: the second is refused, in one sentence."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from run_folders import LAUNCH, RECIPE, put, snapshot, started

from sftlab.files import write_json
from sftlab.runs.run_directory import Run
from sftlab.runs.run_lock import LOCK

HOLDER = """
import sys, time
from pathlib import Path
from sftlab.runs import run_lock
run_lock.socket.gethostname = lambda: "node7"
run_lock.os.environ["SLURM_JOB_ID"] = "7"
run_lock.acquire(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process, as if on node7, that trains in tmp_path/r."""
    started(tmp_path / "r")[0].release()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "r")], stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_launch_into_a_folder_is_refused_until_the_first_has_died(
    tmp_path, monkeypatch, holder
):
    before = snapshot(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(
            ValueError, match=rf"is being written by .*process {holder.pid} on node7, since 20"
        ):
            started(tmp_path / "r", overwrite=overwrite)
    run = Run(tmp_path / "r", is_main=True)
    with pytest.raises(ValueError, match="is being written by a running process"):
        run.begin(run_start(tmp_path / "r"), RECIPE, LAUNCH)
    assert snapshot(tmp_path) == before
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    with pytest.raises(ValueError, match="is being written by"):
        started(tmp_path / "r")
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # Slurm restarted the job of a node that is gone
    Run(tmp_path / "r", is_main=True).look(RECIPE, LAUNCH, overwrite=False)
    holder.kill()
    holder.wait()
    assert b"node7" in (tmp_path / "r" / LOCK).read_bytes(), "the dead process's entry"
    started(tmp_path / "r")[0].release()


def run_start(folder):
    """How a run would start, if nobody held its lock."""
    from sftlab.runs.run_directory import Start

    return Start(seen=(folder / "run.json").read_bytes())


@pytest.mark.parametrize(
    ("content", "refused"),
    [
        ({"host": "node7", "pid": 1, "process_started": 1}, True),
        ({"host": os.uname().nodename, "pid": os.getppid(), "process_started": None}, False),
        ({"host": os.uname().nodename, "pid": 2**22 + 1, "process_started": 5}, False),
        ({"host": os.uname().nodename}, False),
    ],
)
def test_without_locks_on_the_file_system_the_entry_decides(
    tmp_path, monkeypatch, content, refused
):
    started(tmp_path / "r")[0].release()
    write_json(tmp_path / "r" / LOCK, content)

    def no_locks(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    if not refused:
        return started(tmp_path / "r")[0].release()
    with pytest.raises(ValueError, match="process 1 on node7, and its file system has no locks"):
        started(tmp_path / "r")


def test_two_launches_a_damaged_record_and_foreign_folders_end_in_one_sentence(
    fields, tmp_path, train_here, holder
):
    done = train_here({**fields, "output_dir": str(tmp_path / "r")})
    assert "error: " in done.stderr and "on node7" in done.stderr
    put(tmp_path / "mine", "checkpoint-500/model.safetensors")
    for more in ({}, {"overwrite": "true"}, {"dataset_name": "nowhere.jsonl"}):
        done = train_here({**fields, **more, "output_dir": str(tmp_path / "mine")})
        assert done.returncode and "Traceback" not in done.stderr
        assert list(snapshot(tmp_path / "mine")) == ["checkpoint-500/model.safetensors"]
