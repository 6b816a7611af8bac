"""Runs every measurement that random weights allow, one after the other on this machine's GPUs.

python benchmarks/run_all.py [--only NAME ...] [--list] [--out runs/on_gpus]

Jobs of all GPUs run alone, in the order below. Jobs of one GPU run beside each other, one a GPU,
each on processor cores of its own. `--at_once` is for H200s; smaller GPUs get fewer trainings.
Started again, it skips what ended well; what was broken off continues where its script can. A job's
output is in OUT/NAME.log, the names of what ended well in OUT/done. The exit status is 1 where a
job failed.
"""

import os
import queue
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from sftlab.exit_messages import mistakes_in_one_line
from sftlab.paths import ROOT
from sftlab.planning.gpu_specs import GPUS, MEASURED_ON
from sftlab.script_options import Options

STUDY = "recipes/study.py recipes/studies"
FLOAT32 = "'sft.py fp32, 20 rows' 'published loop, fp32'"
DETERMINISTIC = "'sft.py bf16' 'sft.py bf16, deterministic' 'sft.py bf16, dropout 0.05'"
ALL_GPUS = {
    "ddp_scaling": f"{STUDY}/ddp_scaling.yaml --random llama3.2-1b --max_steps 24 --at_once 6",
    "fsdp_scaling": f"{STUDY}/fsdp_scaling.yaml --random llama3.2-1b --max_steps 24 --at_once 6",
    "ddp_vs_fsdp": f"{STUDY}/ddp_vs_fsdp.yaml --random llama3.2-1b --max_steps 24 --at_once 9",
    "strategy_7b": f"{STUDY}/strategy_7b.yaml --random llama2-7b --at_once 4",
    "throughput_all_gpus": "benchmarks/throughput.py",
    "plan_2gpus": "benchmarks/plan_accuracy_measure.py --gpus 2 --out runs/plan_2gpus",
    "resume_on_gpus": "benchmarks/resume_on_gpus.py",
}
ONE_GPU = {
    "techniques": f"{STUDY}/techniques.yaml --random llama3.2-1b --max_steps 10 --at_once 4",
    "ddp_vs_fsdp_1gpu": f"{STUDY}/ddp_vs_fsdp.yaml --random llama3.2-1b --processes 1"
    " --max_steps 24 --at_once 9 --runs runs/study-ddp_vs_fsdp_1gpu",
    "strategy_7b_1gpu": f"{STUDY}/strategy_7b.yaml --random llama2-7b --processes 1"
    " --at_once 3 --runs runs/study-strategy_7b_1gpu",
    "precision": f"{STUDY}/precision.yaml --random llama3.2-1b --at_once 5",
    "kv_cache": "benchmarks/kv_cache.py --model llama3.2-1b --dtype bfloat16",
    "kv_cache_float32": "benchmarks/kv_cache.py --model llama3.2-1b --batches 1 8 --prompts 256"
    " --outputs 32 --out results/kv_cache_float32",
    "throughput": "benchmarks/throughput.py",
    "float32": f"benchmarks/throughput.py --variants {FLOAT32} --out results/float32",
    "deterministic": f"benchmarks/throughput.py --variants {DETERMINISTIC} --repeats 5"
    " --out results/deterministic",
    "plan_1gpu": "benchmarks/plan_accuracy_measure.py --gpus 1 --out runs/plan_1gpu",
}


def main(argv: list[str]) -> None:
    """Run the jobs that are not done."""
    parser = Options(description=__doc__.splitlines()[0])
    jobs = {**ALL_GPUS, **ONE_GPU}
    parser.add_argument(
        "--only",
        nargs="+",
        choices=jobs,
        default=list(jobs),
        metavar="NAME",
        help="these, in this order",
    )
    parser.add_argument("--list", action="store_true", help="print the commands")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "on_gpus")
    arguments = parser.parse_args(argv)
    if arguments.list:
        return print("\n".join(f"{name}: python {jobs[name]}" for name in arguments.only))
    if not (gpus := torch.cuda.device_count()):
        sys.exit("error: there is no GPU here")
    memory_gb = torch.cuda.get_device_properties(0).total_memory / 2**30
    lacking = run(
        {name: held_by(memory_gb, jobs[name]) for name in arguments.only}, gpus, arguments.out
    )
    sys.exit(f"error: {', '.join(lacking)} failed, see {arguments.out}" if lacking else 0)


def held_by(memory_gb: float, words: str) -> str:
    """Returns a job's words with no more trainings at once than a GPU's memory holds."""
    share = min(
        1.0, memory_gb / (0.99 * GPUS[MEASURED_ON].memory_gb)
    )  # of one name, some show a little less
    return re.sub(
        r"(?<=--at_once )\d+", lambda at_once: str(max(1, int(int(at_once[0]) * share))), words
    )


def run(jobs: Mapping[str, str], gpus: int, folder: Path) -> list[str]:
    """Run the jobs (Python's words by name) that `folder` does not call done.

    Returns the names of those that failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = (
        (folder / "done").read_text(encoding="utf-8").split() if (folder / "done").is_file() else []
    )
    for name in jobs:
        if name in done:
            print(f"{name}: done before", flush=True)
    left = [name for name in jobs if name not in done]
    ended = {name: one(name, jobs[name], folder) for name in left if name not in ONE_GPU}
    places: queue.Queue[tuple[str, Sequence[int]]] = queue.Queue()
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    for place in zip(names.split(","), shares(gpus), strict=True):
        places.put(place)

    def on_a_gpu(name: str) -> bool:
        gpu, cores = places.get()
        try:
            return one(name, jobs[name], folder, gpu, cores)
        finally:
            places.put((gpu, cores))

    alone = [name for name in left if name in ONE_GPU]
    pool = ThreadPoolExecutor(gpus)
    try:
        ended |= dict(zip(alone, pool.map(on_a_gpu, alone), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C nothing more begins
    return [name for name in left if not ended[name]]


def one(
    name: str, words: str, folder: Path, gpu: str | None = None, cores: Sequence[int] = ()
) -> bool:
    """Run a job, on one GPU and its own cores where given. Returns whether it ended well."""
    visible = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    print(f"{name}: begins{'' if gpu is None else f' on GPU {gpu}'}", flush=True)
    began = time.monotonic()
    with (folder / f"{name}.log").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            f"exec {sys.executable} {words}",
            shell=True,
            cwd=ROOT,
            env=os.environ | visible,
            stdout=log,
            stderr=log,
        )
        if cores:
            os.sched_setaffinity(process.pid, cores)
        code = process.wait()
    print(
        f"{name}: {'done' if code == 0 else f'exit status {code}'}, {time.monotonic() - began:.0f} "
        "s",
        flush=True,
    )
    if code == 0:
        with (folder / "done").open("a", encoding="utf-8") as done:
            done.write(f"{name}\n")
    return code == 0


def shares(count: int) -> list[list[int]]:
    """Returns this process's processor cores in `count` parts.

    The two threads of a core stay together, so that no two jobs share a core.
    """
    physical: dict[str, list[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        physical.setdefault(siblings.read_text() if siblings.is_file() else str(cpu), []).append(
            cpu
        )
    cores = list(physical.values())
    each = max(1, len(cores) // count)
    parts = [cores[i * each : (i + 1) * each] for i in range(count)]
    return [[cpu for core in part for cpu in core] for part in parts]


if __name__ == "__main__":
    with mistakes_in_one_line():
        main(sys.argv[1:])
