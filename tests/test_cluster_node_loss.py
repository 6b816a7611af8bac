"""A node that dies in the middle of a training on two nodes: the job goes on without it."""

import pytest
from conftest import ROOT, read, short_fields
from slurm_cluster import FOUND, SlurmCluster

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(None in FOUND.values(), reason="slurm-wlm is not installed"),
]
# how long the controller waits for a node's answer; minutes on a cluster in use
TIMEOUT_S = 40


@pytest.fixture
def cluster(tmp_path):
    """Three nodes, of which a training gets two."""
    with SlurmCluster(tmp_path / "slurm", nodes=3, slurmd_timeout=TIMEOUT_S) as cluster:
        yield cluster


@pytest.mark.parametrize("which", ["the first", "the second"])
def test_the_job_goes_on_when_a_node_dies(cluster, base, rows, tmp_path, which):
    run, log = tmp_path / "run", tmp_path / "log"
    fields = short_fields(base, rows, run) | {"lora_dropout": "0", "max_steps": "600"}
    fields |= {"save_strategy": "steps", "save_steps": "50", "save_total_limit": "2"}
    job = cluster.submit(
        f"--output={log}",
        "--nodes=2",
        *("slurm/train.sbatch", "recipes/demo/attn_r16.yaml", "accelerate_configs/cpu.yaml"),
        *(f"--{name}={value}" for name, value in fields.items()),
        cwd=ROOT,
        PATH=f"{ROOT}/.venv/bin:{cluster.env['PATH']}",
        HF_HUB_OFFLINE="1",
        OMP_WAIT_POLICY="PASSIVE",
    )
    has_checkpoint = lambda: bool(list(run.glob("checkpoint-*/trainer_state.json")))  # noqa: E731
    cluster.wait_until(has_checkpoint, True, seconds=180)
    first, second = nodes_of(cluster, job)
    lost = first if which == "the first" else second
    cluster.lose(lost)
    assert cluster.wait(job, "COMPLETED", "FAILED", "NODE_FAIL", seconds=400) == "COMPLETED", (
        log.read_text()[-3000:]
    )
    assert lost not in nodes_of(cluster, job)
    record = read(run)
    assert (record["status"], record["ran"]["world_size"]) == ("succeeded", 2)
    assert [stop for stop in record["interruptions"] if stop["step"] >= 50]


def nodes_of(cluster, job):
    """The names of a job's nodes."""
    shown = cluster.run("scontrol", "-o", "show", "job", job)
    names = shown.partition(" NodeList=")[2].split()[0]
    return cluster.run("scontrol", "show", "hostnames", names).split()
