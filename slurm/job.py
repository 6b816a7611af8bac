"""Run the work of a Slurm job. The sbatch files in this folder start it.

sbatch slurm/train.sbatch RECIPE.yaml LAUNCH.yaml [--field value]
python slurm/job.py train RECIPE.yaml LAUNCH.yaml [--field value]      (what train.sbatch runs)

The work runs under srun. This process waits, handles Slurm's signals and decides how the job ends.
It goes by run.json, not by a launcher's exit status:

- A run that succeeded in this job completes it. One that failed or disappeared fails it, for good.
- A run that was stopped before the time limit or by preemption, or that lost a node, is requeued,
  at most SFTLAB_MAX_RESTARTS times.
- A cancelled job ends cancelled.
"""

import ctypes
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from sftlab.child_process import Child
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.field_words import field_words
from sftlab.runs.run_directory import Run, read_run
from sftlab.slurm_job import (
    first_address,
    job_fact,
    lost_nodes,
    output_of,
    restart_count,
    same_place,
    same_resources,
    submit,
)
from sftlab.yaml_files import read_yaml

# seconds to wait for Slurm to end this process after a requeue
REQUEUED_S = 120
# seconds beyond its SlurmdTimeout in which Slurm acts on a lost node
NOTICED_S = 60
PATHS = "paths start at the project's folder"
PR_SET_CHILD_SUBREAPER = 36
# How a node's task ends. srun returns the highest status of all, so one failure counts more than
# any number of tasks that were told to stop because of it.
TOLD_TO_STOP, FAILED = 128 + signal.SIGTERM, 200


def main(argv: list[str]) -> int:
    """Run what the sbatch file names. Returns the job's exit status."""
    kinds = {
        "train": train,
        "evaluate": evaluate,
        "study": study,
        "tokenize": tokenize,
        "node": node,
    }
    with mistakes_in_one_line(FileNotFoundError):
        if not argv or argv[0] not in kinds:
            raise ValueError(
                f"the sbatch files beside this one start it, with one of {', '.join(kinds)}"
            )
        return kinds[argv[0]](argv[1:])


def train(words: list[str]) -> int:
    """RECIPE LAUNCH [--field value ...]: start sft.py on every node, one process per GPU."""
    if len(words) < 2 or words[1].startswith("-"):
        raise ValueError(
            "usage: sbatch slurm/train.sbatch RECIPE.yaml LAUNCH.yaml [--field value ...]"
        )
    recipe, launch, fields = words[0], words[1], words[2:]
    run = output_dir(read_yaml(recipe, hint=PATHS), fields) / "run.json"
    nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
    processes = nodes * processes_a_node(read_yaml(launch, "launch config", PATHS))
    launched = launch_options(launch, nodes, processes)
    if restart_count() and succeeded_here(run):
        print(f"{run.parent}: succeeded before the restart", flush=True)
        return 0
    started = time.time()
    step = ["--nodes", str(nodes), "--ntasks-per-node=1", sys.executable, "slurm/job.py", "node"]
    work = under_srun([*step, "recipes/sft.py", *launched, "--config", recipe, *fields])
    code = work.wait()
    changed = run.is_file() and run.stat().st_mtime >= started
    return end_of_training(run, code, changed, work.asked_to_stop)


def launch_options(launch: str, nodes: int, processes: int) -> list[str]:
    """Returns the launch config and accelerate's options for this job."""
    # another port after a requeue, because the last one may still be closing
    port = 20000 + (7 * int(os.environ["SLURM_JOB_ID"]) + restart_count()) % 10000
    options = {
        "config_file": launch,
        "num_machines": nodes,
        "num_processes": processes,
        "main_process_ip": first_address(),
        "main_process_port": port,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def end_of_training(run: Path, code: int, changed: bool, asked_to_stop: bool) -> int:
    """Decide how the job ends, by run.json. Returns its exit status, or requeues it.

    `code` is srun's exit status. `changed` says that this job wrote run.json.
    """
    status = status_of(run) if changed else None
    if status == "succeeded":
        return 0
    # a run that a full disk stopped would be stopped again
    if status == "interrupted" and str(read_run(run.parent)["reason"]).startswith("signal "):
        return requeue(f"{run.parent} was interrupted")
    if status == "running" and asked_to_stop:
        return requeue(f"{run.parent} was cut off while it stopped")
    if int(os.environ["SLURM_JOB_NUM_NODES"]) > 1 and (lost := lost_nodes()):
        return wait_for_other_nodes(f"{run.parent} lost {', '.join(lost)}")
    if code == TOLD_TO_STOP and status in (None, "running"):
        # Slurm may repeat an earlier signal to a step of the same number, after a lost node
        return requeue(f"{run.parent} was told to stop before it could save anything")
    why = reason_of(run.parent) if changed else "it did not begin"
    print(f"error: {run.parent}: {why} (srun ended with {code})", file=sys.stderr, flush=True)
    return 1


def reason_of(folder: Path) -> str:
    """Returns why a run failed. A run that still says running is recorded as failed first."""
    try:
        Run(folder, is_main=False).fail(
            "its processes ended without an error message: was one killed?", rank=None
        )
        return read_run(folder)["reason"]
    except OSError as error:
        return f"it failed, and run.json cannot say so: {error}"


def evaluate(words: list[str]) -> int:
    """RUN [evaluation ...]: run scripts of eval/ one after the other."""
    if not words:
        raise ValueError(
            "usage: sbatch slurm/eval.sbatch RUN ['script of eval/ and its options' ...]"
        )
    run = words[0]
    if not (Path(run) / "run.json").is_file():
        raise ValueError(f"{run} is no run directory: it has no run.json")
    evaluations = [shlex.split(one) for one in words[1:] or [usual_evaluation(Path(run))]]
    for name, *_ in evaluations:
        if not Path("eval", f"{name}.py").is_file():
            known = ", ".join(sorted(path.stem for path in Path("eval").glob("*.py")))
            here = f"there are {known}" if known else f"start it in the project's folder, {PATHS}"
            raise ValueError(f"there is no evaluation {name}: {here}")
    for left, (name, *options) in zip(reversed(range(len(evaluations))), evaluations, strict=True):
        which = "--runs" if name == "report" else "--run"
        if code := one_command(
            [sys.executable, f"eval/{name}.py", which, run, *options], more_to_do=left > 0
        ):
            return code
    return 0


def usual_evaluation(run: Path) -> str:
    """Returns the script of eval/ that answers first whether a run's training did what it should.

    That is preferences for preference tuning, which it scores beside what was lost; else quality.
    """
    recipe = _written(run / "run.json").get("recipe")
    is_dpo = isinstance(recipe, dict) and recipe.get("method") == "dpo"
    return "preferences" if is_dpo else "quality"


def study(words: list[str]) -> int:
    """STUDY [options]: train a study's tasks.

    The first job submits an array, whose tasks train, and a last job, which writes the tables.
    """
    if not words:
        raise ValueError("usage: sbatch slurm/study.sbatch STUDY.yaml [options of study.py]")
    command = [sys.executable, "recipes/study.py", *words]
    if os.environ.get("SFTLAB_STUDY") == "tables":
        return one_command([*command, "--no_train"])
    if (task := os.environ.get("SLURM_ARRAY_TASK_ID")) is not None:
        return one_command([*command, "--task", task])
    planned = subprocess.run([*command, "--dry-run"], capture_output=True, text=True)
    if planned.returncode:
        raise ValueError(planned.stderr.strip().splitlines()[-1].removeprefix("error: "))
    count = len(planned.stdout.splitlines())
    tasks = ["--array", f"0-{count - 1}", *same_place(), *same_resources()]
    array = submit([*tasks, "slurm/study.sbatch", *words])
    after = [f"--dependency=afterany:{array}", "--job-name=tables"]
    last = submit([*after, *same_place(), "slurm/study.sbatch", *words], tables=True)
    print(f"{count} tasks are job {array}, their tables job {last}", flush=True)
    return 0


def tokenize(words: list[str]) -> int:
    """[options of tokenize_dataset.py]: tokenize with one worker per core of the job."""
    cores = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE", "1")
    workers = [] if any(word.startswith("--workers") for word in words) else ["--workers", cores]
    return one_command([sys.executable, "slurm/tokenize_dataset.py", *words, *workers])


def node(words: list[str]) -> int:
    """Run the script that launches itself on this node, and end all its processes after it."""
    # the processes of a killed launcher become children of this one, which can end them
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    stop_seconds = os.environ.get("SFTLAB_STOP_SECONDS", "600")
    position = words.index("--num_machines")
    words = [*words[:position], "--machine_rank", os.environ["SLURM_NODEID"], *words[position:]]
    work = Child([sys.executable, *words], env=os.environ | {"PET_SHUTDOWN_TIMEOUT": stop_seconds})
    code = work.wait()
    for left in psutil.Process().children(recursive=True):
        left.kill()
    return code and (TOLD_TO_STOP if work.asked_to_stop else FAILED)


def under_srun(words: list[str]) -> Child:
    """Start a step of the job. When one of its tasks fails, all end."""
    # srun itself would kill the step on TERM
    to_the_step = ["scancel", "--signal=TERM", os.environ["SLURM_JOB_ID"]]
    # a step has one core per task unless it asks for more
    cores = min(map(int, re.findall(r"(\d+)(?:\(x\d+\))?", os.environ["SLURM_JOB_CPUS_PER_NODE"])))
    command = ["srun", "--kill-on-bad-exit=1", f"--cpus-per-task={cores}", *words]
    return Child(command, pass_on=lambda: subprocess.run(to_the_step))


def one_command(command: list[str], more_to_do: bool = False) -> int:
    """Run a command in one task. Returns its exit status.

    The job is requeued where a signal stopped the command, or came while there is more to do.
    """
    work = under_srun(["--nodes=1", "--ntasks=1", *command])
    code = work.wait()
    if work.asked_to_stop and (code or more_to_do):
        return requeue(f"{command[1]} was interrupted")
    return code


def requeue(what: str) -> int:
    """Requeue this job if it still runs and has restarts left. Returns an exit status if not."""
    state = job_fact("JobState")
    if state != "RUNNING":
        print(f"{what}; the job is {state.lower()}", flush=True)
        return 1
    restarts, most = restart_count(), int(os.environ.get("SFTLAB_MAX_RESTARTS", 20))
    if restarts >= most:
        print(
            f"error: {what}, and {most} restarts are used up: submit it again to go on",
            file=sys.stderr,
            flush=True,
        )
        return 1
    print(f"{what}: requeued, restart {restarts + 1} of at most {most}", flush=True)
    # Slurm now ends this process; if it ended by itself before that, the job would end
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
    time.sleep(REQUEUED_S)
    return 1


def wait_for_other_nodes(what: str) -> int:
    """Wait until Slurm notices a lost node and requeues this job. Returns an exit status if not.

    Requeued at once, the job could get the same node again, which Slurm takes for a free one until
    its SlurmdTimeout is over.
    """
    found = re.search(r"SlurmdTimeout\s*=\s*(\d+)", output_of("scontrol", "show", "config"))
    seconds = int(found[1]) if found else 300
    print(f"{what}: waiting at most {seconds} s until Slurm notices, and requeues", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    deadline = time.monotonic() + seconds + NOTICED_S
    while time.monotonic() < deadline and job_fact("JobState") == "RUNNING":
        time.sleep(5)
    return requeue(what)


def processes_a_node(config: dict[str, Any]) -> int:
    """Returns one process per GPU, or --ntasks-per-node under a launch config for CPUs."""
    if str(config.get("gpu_ids", "")).startswith("-1") or config.get("use_cpu"):
        return int(os.environ.get("SLURM_NTASKS_PER_NODE", 1))
    if not (gpus := int(os.environ.get("SLURM_GPUS_ON_NODE", 0))):
        raise ValueError(
            "the launch config needs GPUs and the job has none: sbatch --gpus-per-node=N"
        )
    return gpus


def output_dir(recipe: dict[str, Any], fields: list[str]) -> Path:
    """Returns the run directory: the last output_dir of `fields`, else the recipe's."""
    given = field_words(fields).get("output_dir")
    if given is not None and len(given) != 1:
        raise ValueError(f"--output_dir has {len(given)} values: give one folder, runs/NAME")
    found = given[0] if given else recipe.get("output_dir")
    if not found:
        raise ValueError("the recipe has no output_dir: add it, or pass --output_dir")
    if isinstance(found, list | dict):
        raise ValueError(f"the recipe's output_dir is {found!r}: expected one folder, runs/NAME")
    return Path(str(found))


def status_of(run: Path) -> str | None:
    """Returns the status in run.json, or None where it cannot be read."""
    return _written(run).get("status")


def succeeded_here(run: Path) -> bool:
    """Whether run.json is of a run that succeeded and that this very job trained."""
    record = _written(run)
    here = record.get("slurm_job") == os.environ["SLURM_JOB_ID"]
    return here and record.get("status") == "succeeded"


def _written(run: Path) -> dict[str, Any]:
    """Returns what run.json holds; nothing where it cannot be read."""
    try:
        record = json.loads(run.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


if __name__ == "__main__":
    with mistakes_in_one_line():
        sys.exit(main(sys.argv[1:]))
