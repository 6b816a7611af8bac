"""Tokenizing on a cluster makes the same bytes, however often workers are lost."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

import psutil
import pytest
from conftest import (
    ROOT,
    arguments,
    load_script,
    write_jsonl,
)
from slurm_cluster import FOUND, SlurmCluster
from tokenizing import ODD, contents, fields_of, refused, tokenized

from sftlab.config.launch import Launch
from sftlab.config.parser import parse_recipe
from sftlab.data.shard_folder import begin
from sftlab.data.shard_writer import tokenize_shard
from sftlab.data.tokenized_dataset import MANIFEST


@pytest.fixture(scope="module")
def script():
    return load_script("slurm/tokenize_dataset.py")


def shards_of(folder):
    """Hashes of what must not depend on how it was made: all but the plot."""
    return {name: digest for name, digest in contents(folder).items() if name != "lengths.png"}


@pytest.fixture(scope="module")
def made(script, base, rows, tmp_path_factory):
    """Fields of a recipe, and the folder of its tokens, in shards of 16 rows."""
    folder = tmp_path_factory.mktemp("made")
    fields = fields_of(base, rows, folder)
    tokenized(script, fields, folder / "tokens", size=16)
    return fields, folder / "tokens"


def test_a_stopped_job_goes_on_and_makes_the_same_bytes(script, made, tmp_path):
    fields, whole = made
    folder = shutil.copytree(whole, tmp_path / "tokens")
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"facts": None, "shards": []}))
    (folder / "shard-00002.json").unlink()  # killed before the record was written
    (folder / "train-00003.arrow").unlink()
    broken = folder / "train-00004.arrow"
    broken.write_bytes(broken.read_bytes()[:-9] + b"\0" * 9)
    (folder / "shard-00005.json").write_text('{"number": 5, "fi')
    (folder / ".train-00006.arrow.host.17.part").write_bytes(b"half")
    kept = folder / "train-00007.arrow"
    before = kept.stat().st_mtime_ns
    tokenized(script, fields, folder, size=16)
    assert shards_of(folder) == shards_of(whole)
    assert kept.stat().st_mtime_ns == before


def command(fields, out, *more):
    return [
        sys.executable,
        str(ROOT / "slurm" / "tokenize_dataset.py"),
        "--out",
        str(out),
        *more,
        *arguments(fields),
    ]


@contextmanager
def started(command, **how):
    """A process that does not outlive a test that fails."""
    with subprocess.Popen(command, cwd=ROOT, **how) as running:
        try:
            yield running
        finally:
            running.terminate()


def wait_for(look, seconds=60):
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def forty_shards(script, base, folder, size=20):
    """Fields of a recipe with 40 shards of `size` long rows, and the files of every tenth shard,
    made here.
    """
    lines = [{"instruction": f"{i} {ODD * 80}", "response": ODD} for i in range(40 * size)]
    roomy = shutil.copytree(base, folder / "base")
    config = json.loads((roomy / "config.json").read_text())
    (roomy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    fields = fields_of(roomy, write_jsonl(folder / "rows.jsonl", lines), folder, max_length="8000")
    out = ["--out", str(folder / "some"), "--rows_per_shard", str(size)]
    given, rest = script.parse_arguments([*out, *arguments(fields)])
    places, *made = script.prepare(parse_recipe(rest, Launch.from_environment()), given)
    begin(folder / "some", *made)
    for number in range(0, 40, 10):
        tokenize_shard(str(folder / "some"), number, places[number])
    return fields, {
        name: digest for name, digest in contents(folder / "some").items() if name != MANIFEST
    }


def shards_there(out):
    return len(list(out.glob("shard-*.json")))


@pytest.mark.cluster
def test_two_workers_one_of_them_killed_make_the_bytes_of_one(script, base, tmp_path):
    (fields, some), out = forty_shards(script, base, tmp_path), tmp_path / "tokens"
    log = tmp_path / "log"
    two = command(fields, out, "--workers", "2", "--rows_per_shard", "20")
    with log.open("w") as file, started(two, stdout=file, stderr=file) as running:
        wait_for(lambda: shards_there(out) > 3)
        workers = [
            p
            for p in psutil.Process(running.pid).children()
            if "spawn_main" in " ".join(p.cmdline())
        ]
        assert len(workers) == 2
        workers[1].suspend()
        workers[0].kill()
        assert shards_there(out) < 40, "it was over before a worker was killed"
        workers[1].resume()
        assert running.wait(120) == 0, log.read_text()
    assert shards_there(out) == 40
    assert some.items() <= contents(out).items()
    assert not [name for name in contents(out) if name.startswith(".")]
    assert (out / "lengths.png").stat().st_size > 5000


@pytest.mark.cluster
@pytest.mark.skipif(not all(FOUND.values()), reason="Slurm is not installed (Debian: slurm-wlm)")
def test_jobs_of_slurm_one_of_them_cancelled_make_the_same_bytes(script, base, tmp_path):
    (fields, some), out = forty_shards(script, base, tmp_path), tmp_path / "tokens"
    log = tmp_path / "log"
    two = command(fields, out, "--cluster", "slurm", "--workers", "2", "--rows_per_shard", "20")
    with (
        SlurmCluster(tmp_path / "slurm") as slurm,
        log.open("w") as file,
        started(two, stdout=file, stderr=file, env=slurm.env) as running,
    ):
        wait_for(lambda: shards_there(out) > 3)
        first = slurm.run("squeue", "-h", "-o", "%i").split()
        assert len(first) == 2
        # the other waits, or it might be done before the lost one is replaced
        slurm.run("scontrol", "suspend", first[1])
        slurm.run("scancel", first[0])
        wait_for(
            lambda: (
                set(slurm.run("squeue", "-h", "-t", "PENDING,RUNNING", "-o", "%i").split())
                - set(first)
            )
        )
        assert shards_there(out) < 40, "it was over before the job was cancelled"
        slurm.run("scontrol", "resume", first[1])
        assert running.wait(120) == 0, log.read_text()
        slurm.wait_until(lambda: slurm.run("squeue", "-h", "-o", "%i"), "")
    assert shards_there(out) == 40
    assert some.items() <= contents(out).items()


def test_little_travels_to_a_worker_and_back(script, made, tmp_path):
    fields, folder = made
    given, rest = script.parse_arguments(["--out", str(folder), *arguments(fields)])
    places, *_ = script.prepare(parse_recipe(rest, Launch.from_environment()), given)
    assert all(len(place) < 10_000 for place in places)
    assert all(path.stat().st_size < 2_000 for path in folder.glob("shard-*.json"))


def test_a_job_that_slurm_does_not_take_is_one_sentence(script, made, tmp_path, monkeypatch):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        "#!/bin/sh\necho 'sbatch: error: invalid partition specified: nowhere' >&2\nexit 1\n"
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    said = refused(
        script, made[0], tmp_path / "out", "--cluster", "slurm", "--partition", "nowhere"
    )
    assert "invalid partition specified: nowhere" in said


@pytest.mark.cluster
@pytest.mark.skipif(not all(FOUND.values()), reason="Slurm is not installed (Debian: slurm-wlm)")
def test_jobs_that_end_before_they_report_are_not_waited_for_for_ever(script, base, tmp_path):
    fields, _ = forty_shards(script, base, tmp_path)
    words = command(
        fields,
        tmp_path / "tokens",
        "--cluster",
        "slurm",
        "--workers",
        "2",
        "--rows_per_shard",
        "20",
    )
    with SlurmCluster(tmp_path / "slurm") as slurm:
        broken = slurm.env | {"DASK_JOBQUEUE__SLURM__PYTHON": "/bin/false"}
        done = subprocess.run(
            words, env=broken, capture_output=True, text=True, cwd=ROOT, timeout=120
        )
    assert done.returncode == 1
    assert "none of them reported: see" in done.stderr.strip().splitlines()[-1], done.stderr[-3000:]
