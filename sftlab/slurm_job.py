"""What Slurm knows of the job that this process runs in, and how another job is submitted."""

import os
import subprocess
import time

# seconds for a node to answer after a failure; a busy one takes some
ANSWER_S = 60


def job_fact(name: str) -> str:
    """Returns a field of this job from Slurm's controller."""
    words = output_of("scontrol", "-o", "show", "job", os.environ["SLURM_JOB_ID"]).split()
    return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), "")


def restart_count() -> int:
    """Returns how often Slurm has restarted this job."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def output_of(*command: str) -> str:
    """Returns what a command prints. Raises CalledProcessError where it fails."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def nodes_of_the_job() -> list[str]:
    """Returns the names of the job's nodes, the first first."""
    return output_of("scontrol", "show", "hostnames").split()


def first_address() -> str:
    """Returns the address of the job's first node."""
    first = nodes_of_the_job()[0]
    facts = output_of("scontrol", "-o", "show", "node", first).split()
    return next((word.partition("=")[2] for word in facts if word.startswith("NodeAddr=")), first)


def lost_nodes() -> list[str]:
    """Returns the job's nodes that do not answer.

    Slurm itself takes minutes to notice a node that died.
    """
    command = ["srun", "--overlap", "--nodes=1", "--ntasks=1"]
    asked = {
        node: subprocess.Popen(
            [*command, f"--nodelist={node}", "true"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for node in nodes_of_the_job()
    }
    deadline, lost = time.monotonic() + ANSWER_S, []
    for node, process in asked.items():
        try:
            answered = process.wait(max(0.0, deadline - time.monotonic())) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            answered = False
        if not answered:
            lost.append(node)
    return lost


def same_place() -> list[str]:
    """Returns sbatch options for this job's partition, account, QOS and time limit."""
    return [
        f"--time={job_fact('TimeLimit')}",
        *_as_given(partition="JOB_PARTITION", account="JOB_ACCOUNT", qos="JOB_QOS"),
    ]


def same_resources() -> list[str]:
    """Returns sbatch options for this job's cores, GPUs and memory."""
    options = _as_given(
        cpus_per_task="CPUS_PER_TASK",
        gpus="GPUS",
        gpus_per_node="GPUS_PER_NODE",
        gpus_per_task="GPUS_PER_TASK",
        mem="MEM_PER_NODE",
        mem_per_cpu="MEM_PER_CPU",
        mem_per_gpu="MEM_PER_GPU",
    )
    if not any(option.startswith("--gpus") for option in options) and (
        generic := job_fact("TresPerNode")
    ):
        options.append("--gres=" + generic.replace("gres/", "").replace("gres:", ""))
    return options


def _as_given(**variables: str) -> list[str]:
    """Returns sbatch options with the values of this job's SLURM_ variables."""
    found = {
        option.replace("_", "-"): os.environ.get(f"SLURM_{name}")
        for option, name in variables.items()
    }
    return [
        f"--{option}={value}"
        for option, value in found.items()
        if value not in (None, "", "0", "(null)")
    ]


def submit(words: list[str], tables: bool = False) -> str:
    """Submit a job. Returns its number."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLURM_") or name == "SLURM_CONF"
    }
    kept |= {"SFTLAB_STUDY": "tables"} if tables else {}
    done = subprocess.run(
        ["sbatch", "--parsable", *words], env=kept, capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"sbatch refused: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]
