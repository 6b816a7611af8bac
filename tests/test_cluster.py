"""What sbatch does, on a real Slurm of two nodes:

every ending in run.json and in Slurm, and no process left.
"""

import csv
import subprocess
import time

import psutil
import pytest
import yaml
from conftest import ROOT, read, short_fields
from slurm_cluster import FOUND, SlurmCluster

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        None in FOUND.values(), reason="slurmctld and slurmd are not installed (slurm-wlm)"
    ),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with SlurmCluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture
def train(cluster, base, rows, tmp_path):
    """Submit a training of the tiny model; the job and its folder."""

    def submit(*options, launch="accelerate_configs/cpu.yaml", **more):
        fields = short_fields(base, rows, tmp_path / "run") | more
        words = [f"--{name}={value}" for name, value in fields.items()]
        log = f"--output={tmp_path}/log-%j"
        script = ("slurm/train.sbatch", "recipes/demo/attn_r16.yaml", launch)
        job = cluster.submit(log, *options, *script, *words, cwd=ROOT, **environment(cluster))
        return job, tmp_path / "run"

    return submit


def environment(cluster):
    return {
        "PATH": f"{ROOT}/.venv/bin:{cluster.env['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def left_over(folder):
    """Processes that still work for this run."""
    return [
        p.pid
        for p in psutil.process_iter(["cmdline"])
        if str(folder) in " ".join(p.info["cmdline"] or [])
    ]


def begun(run):
    """Wait until the run has a checkpoint."""
    SlurmCluster.wait_until(lambda: bool(list(run.glob("checkpoint-*/trainer_state.json"))), True)


def workers(run):
    """The training processes of a run."""
    every = psutil.process_iter(["cmdline"])
    words = ((p, p.info["cmdline"] or []) for p in every)
    return [
        p
        for p, line in words
        if "recipes/sft.py" in line[1:3]
        and f"--output_dir={run}" in line
        and "--config_file" not in line
    ]


def ended(cluster, job, run, status, *states):
    """The job and the run ended so, and nothing of them is left."""
    state = cluster.wait(job, seconds=180)
    assert (state, read(run)["status"]) == (states[0], status), (
        run.parent / f"log-{job}"
    ).read_text()[-3000:]
    cluster.wait_until(lambda: len(left_over(run)), 0, seconds=60)


def test_train_then_evaluate(cluster, train, tmp_path):
    job, run = train()
    words = ("slurm/eval.sbatch", str(run), "quality --samples 2")
    options = (f"--output={tmp_path}/eval", f"--dependency=afterok:{job}")
    after = cluster.submit(*options, *words, cwd=ROOT, **environment(cluster))
    ended(cluster, job, run, "succeeded", "COMPLETED")
    assert cluster.wait(after) == "COMPLETED", (tmp_path / "eval").read_text()
    assert (run / "eval" / "quality.json").is_file()


def test_before_its_time_limit_a_job_saves_and_goes_on_by_itself(cluster, train):
    job, run = train(max_steps="900", save_strategy="steps", save_steps="100")
    begun(run)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    ended(cluster, job, run, "succeeded", "COMPLETED")
    (stop,) = read(run)["interruptions"]
    assert "signal 15 at step" in stop["reason"]
    assert (
        cluster.run("scontrol", "-o", "show", "job", job).partition("Restarts=")[2].split()[0]
        == "1"
    )


def test_a_cancelled_job_ends_interrupted_and_stays_so(cluster, train):
    job, run = train(max_steps="100000", save_strategy="steps", save_steps="100")
    begun(run)
    cluster.run("scancel", job)
    ended(cluster, job, run, "interrupted", "CANCELLED")
    assert cluster.run("squeue", "-h", "-j", job, "-o", "%T").strip() in (
        "",
        "CANCELLED",
        "COMPLETING",
    )


def test_two_nodes_train_as_one(cluster, train):
    job, run = train("--nodes=2", lora_dropout="0")
    ended(cluster, job, run, "succeeded", "COMPLETED")
    assert read(run)["ran"]["world_size"] == 2


def test_a_job_that_was_preempted_goes_on(cluster, train):
    job, run = train("--nodes=2", max_steps="900", save_strategy="steps", save_steps="100")
    begun(run)
    whole = ("--partition=urgent", "--nodes=2", "--exclusive")
    urgent = cluster.submit(*whole, "--output=/dev/null", "--wrap=sleep 1", cwd=ROOT)
    assert cluster.wait(urgent, seconds=90) == "COMPLETED"
    ended(cluster, job, run, "succeeded", "COMPLETED")
    assert len(read(run)["interruptions"]) == 1


def test_a_job_that_was_requeued_by_hand_goes_on(cluster, train):
    job, run = train(max_steps="900", save_strategy="steps", save_steps="100")
    begun(run)
    cluster.run("scontrol", "requeue", job)
    ended(cluster, job, run, "succeeded", "COMPLETED")
    assert len(read(run)["interruptions"]) == 1


def test_restarts_have_an_end(cluster, train, monkeypatch):
    monkeypatch.setitem(cluster.env, "SFTLAB_MAX_RESTARTS", "0")
    job, run = train(max_steps="100000", save_strategy="steps", save_steps="100")
    begun(run)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    ended(cluster, job, run, "interrupted", "FAILED")
    assert "0 restarts are used up" in (run.parent / f"log-{job}").read_text()


@pytest.mark.parametrize("the_other", ["works", "hangs"])
def test_a_killed_rank_fails_the_job_at_once(cluster, train, the_other):
    job, run = train("--nodes=2", max_steps="100000", save_strategy="steps", save_steps="100")
    begun(run)
    by_rank = {int(p.environ()["RANK"]): p for p in workers(run)}
    assert len(by_rank) == 2
    if the_other == "hangs":
        by_rank[0].suspend()
    by_rank[1].kill()
    started = time.monotonic()
    ended(cluster, job, run, "failed", "FAILED")
    assert time.monotonic() - started < 60


def test_a_killed_launcher_leaves_no_worker_behind(cluster, train):
    job, run = train("--nodes=2", max_steps="100000", save_strategy="steps", save_steps="100")
    begun(run)
    workers(run)[0].parent().kill()
    started = time.monotonic()
    ended(cluster, job, run, "failed", "FAILED")
    assert time.monotonic() - started < 60


def test_a_full_disk_fails_the_job(cluster, train, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(run)]).returncode
        == 0
    )
    if not mounted:
        pytest.skip("mounting a small file system needs root")
    try:
        job, _ = train(max_steps="900", save_strategy="steps", save_steps="5")
        assert cluster.wait(job) == "FAILED"
        cluster.wait_until(lambda: len(left_over(run)), 0)
        assert read(run)["status"] in ("interrupted", "running")
        *_, last = (tmp_path / f"log-{job}").read_text().strip().splitlines()
        assert last.startswith(f"error: {run}: ")
        assert "No space left" in last or "a checkpoint needs" in last
    finally:
        subprocess.run(["umount", "-l", str(run)], check=True)


def test_a_study_is_an_array_with_tables_at_its_end(cluster, base, rows, tmp_path):
    fields = {k: v for k, v in short_fields(base, rows, tmp_path).items() if k != "output_dir"}
    content = {
        "recipe": "recipes/demo/attn_r16.yaml",
        "launch": "cpu",
        "axis": ["lora_r"],
        "fields": fields,
    }
    content["cells"] = {"r2": {"lora_r": 2, "lora_alpha": 4}, "r4": {"lora_r": 4, "lora_alpha": 8}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    words = [
        str(tmp_path / "small.yaml"),
        "--runs",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "out"),
    ]
    log = f"--output={tmp_path}/log-%A_%a"
    job = cluster.submit(
        log,
        "slurm/study.sbatch",
        *words,
        cwd=ROOT,
        **environment(cluster),
        SBATCH_OUTPUT=f"{tmp_path}/log-%A_%a",
    )
    assert cluster.wait(job) == "COMPLETED"
    cluster.wait_until(lambda: cluster.run("squeue", "-h", "-o", "%i"), "", seconds=180)
    with (tmp_path / "out" / "summary.csv").open() as file:
        assert [(line["cell"], line["status"]) for line in csv.DictReader(file)] == [
            ("r2", "succeeded"),
            ("r4", "succeeded"),
        ]


def test_what_slurm_refuses_is_refused_before_anything_runs(cluster, train):
    with pytest.raises(RuntimeError, match="invalid partition"):
        train("--partition=nowhere")
    with pytest.raises(
        RuntimeError, match=r"Requested node configuration|Invalid generic resource"
    ):
        train("--gpus-per-node=3")
