"""All measurements in one command skip what is done, give a job its GPU, and name failures."""

import json
import os
import shlex
from pathlib import Path

import own_cores
import pytest
from conftest import ROOT, load_script

SCRIPT = load_script("benchmarks/run_all.py")


def job(folder: Path, name: str, code: int = 0) -> str:
    """A job that notes when it ran, on which GPU and cores, and ends with `code`."""
    note = (
        "import json, os, sys, time; began = time.time(); time.sleep(1.5);"
        f"file = open({str(folder / name)!r}, 'a');"
        "facts = [began, time.time(), os.environ.get('CUDA_VISIBLE_DEVICES'), "
        "sorted(os.sched_getaffinity(0))];"
        f"print(json.dumps(facts), file=file, flush=True); sys.exit({code})"
    )
    return f"-c {shlex.quote(note)}"


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Run jobs on all cores; gives those that failed and what each noted."""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, own_cores.ALL)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(SCRIPT, "ONE_GPU", dict.fromkeys(("left", "right", "broken")))

    def run(*names: str, code: int = 0) -> tuple[list[str], dict[str, list]]:
        jobs = {name: job(tmp_path, name, code if name == "broken" else 0) for name in names}
        failed = SCRIPT.run(jobs, 2, tmp_path / "kept")
        notes = {name: (tmp_path / name).read_text().splitlines() for name in names}
        return failed, {name: [json.loads(line) for line in lines] for name, lines in notes.items()}

    yield run
    os.sched_setaffinity(0, mine)


def test_jobs_of_one_gpu_run_beside_each_other_and_those_of_all_alone(ran, monkeypatch):
    failed, notes = ran("left", "both", "right")
    assert not failed
    (left,), (both,), (right,) = notes["left"], notes["both"], notes["right"]
    assert {left[2], right[2]} == {"0", "1"} and both[2] is None
    assert both[1] < min(left[0], right[0]) and max(left[0], right[0]) < min(left[1], right[1])
    assert not set(left[3]) & set(right[3]) or left[3] == right[3] == both[3], (
        "one core alone cannot be shared out"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    _, notes = ran("broken")
    assert notes["broken"][0][2] == "5"


def test_what_failed_is_named_and_alone_runs_again(ran, capsys):
    failed, _ = ran("left", "broken", code=3)
    assert failed == ["broken"] and "broken: exit status 3" in capsys.readouterr().out
    failed, notes = ran("left", "broken")
    assert not failed and "left: done before" in capsys.readouterr().out
    assert [len(notes[name]) for name in ("left", "broken")] == [1, 2]


def test_its_commands_name_what_there_is(capsys):
    SCRIPT.main(["--list"])
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(SCRIPT.ALL_GPUS) + len(SCRIPT.ONE_GPU)
    for line in listed:
        words = shlex.split(line.partition(": python ")[2])
        assert all((ROOT / word).is_file() for word in words if word.endswith((".py", ".yaml"))), (
            line
        )


def test_a_smaller_gpu_gets_fewer_trainings_beside_each_other():
    words = "recipes/study.py x9.yaml --at_once 9 --max_steps 24"
    for memory_gb, at_once in ((139.8, 9), (139.7, 9), (178.4, 9), (79.2, 5), (14.6, 1)):
        assert SCRIPT.held_by(memory_gb, words) == words.replace("at_once 9", f"at_once {at_once}")
    assert (
        SCRIPT.held_by(14.6, "benchmarks/kv_cache.py --batches 8")
        == "benchmarks/kv_cache.py --batches 8"
    )
