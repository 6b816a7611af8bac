"""How much faster do two processes evaluate a run than one, on two GPUs or on a CPU?

python benchmarks/evaluation_processes.py --run RUN [--rows 32] [--max_new_tokens 32] \
    [--batch_size 4] [--pairs 3]

eval/quality.py scores the same rows with one process and with two, in turns. Each has a GPU where
there are two, else one thread of the CPU. The table, cpu.csv or the GPU's name, has the seconds of
the whole command, of its likelihoods and of its answers (median, lowest, highest over the pairs),
and the ratios of the pairs. `processor` is the processor seconds of the process that needs most,
launcher included: other work on the machine moves it less. It stops where the records of two
processes are not those of one to the last bit.
"""

import os
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch

from sftlab.evaluation.base_and_tuned import finished_run
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.paths import ROOT
from sftlab.runs.environment import machine_name, provenance
from sftlab.schema import read_object
from sftlab.script_options import Options
from sftlab.tables import aligned, write_csv

PARTS = ("whole", "before", "likelihoods", "answers", "after", "processor")
SHOWN = ("processes", *PARTS, "ratio_whole", "ratio_evaluation", "ratio_processor")


def main(argv: list[str]) -> None:
    """Evaluate with one and with two processes in turns, and write a row for each."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path, help="a finished run's directory")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "evaluation_processes")
    options = parser.parse_args(argv)
    run = finished_run(options.run)
    measured: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    for pair in range(options.pairs):
        records = []
        for count in (1, 2) if pair % 2 == 0 else (2, 1):
            seconds, found = evaluated(options, count)
            measured[count].append(seconds)
            records.append(found)
            said = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
            print(f"pair {pair}, {count} processes: {said} s", flush=True)
        if records[0] != records[1]:
            raise ValueError(f"pair {pair}: the records of two processes are not those of one")
    lines = [row(options, run, measured, count) for count in measured]
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(options.out / f"{machine_name()}.csv", lines)
    print(aligned([list(SHOWN), *([str(line[name]) for name in SHOWN] for line in lines)]))


def evaluated(options: Any, count: int) -> tuple[dict[str, float], bytes]:
    """Returns the seconds of an evaluation's parts, and the records that it wrote.

    `before` is imports and weights, `after` scores and intervals.
    """
    with TemporaryDirectory(prefix="processes-") as name:
        folder = Path(name) / "run"
        folder.mkdir()
        for one in ("adapter", "run.json"):
            (folder / one).symlink_to((options.run / one).resolve())
        given = {"rows": "samples", "max_new_tokens": "max_new_tokens", "batch_size": "batch_size"}
        words = [f"--{flag}={getattr(options, name)}" for name, flag in given.items()]
        on_gpus = torch.cuda.device_count() > 1
        launch = ROOT / "accelerate_configs" / ("ddp.yaml" if on_gpus else "cpu_ddp.yaml")
        launched = [] if count == 1 else ["--config_file", str(launch)]
        script = str(ROOT / "eval" / "quality.py")
        command = [sys.executable, script, *launched, "--run", str(folder), *words]
        one_thread = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        environment = os.environ | ({} if on_gpus else one_thread)
        started, asked, used = time.time(), 0.0, {}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None:
            asked = asked or (time.time() if list(folder.glob("eval/answers-*")) else 0.0)
            used |= processor_seconds(process.pid)
            time.sleep(0.1)
        ended = time.time()
        if process.returncode:
            raise ValueError(f"the evaluation ended with status {process.returncode}: {command}")
        (answers,) = folder.glob("eval/answers-*")
        last = answers.stat().st_mtime
        report = read_object(folder / "eval" / "quality.json")
        likelihoods = report["likelihood_seconds"]
        launcher = used.pop(process.pid) if count > 1 else 0.0
        slowest = launcher + max(used.values())
        parts = (asked - started - likelihoods, likelihoods, last - asked, ended - last, slowest)
        seconds = dict(zip(PARTS, (ended - started, *parts), strict=True))
        return seconds, (folder / "eval" / "quality.jsonl").read_bytes()


def processor_seconds(process: int) -> dict[int, float]:
    """Returns the processor seconds of a process and its descendants until now."""
    found = {}
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(process)
        for one in (first, *first.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                times = one.cpu_times()
                found[one.pid] = times.user + times.system
    return found


def row(
    options: Any, run: dict[str, Any], measured: dict[int, list[dict[str, float]]], count: int
) -> dict[str, Any]:
    """Returns a line of the table."""
    columns: dict[str, Any] = {}
    for name in PARTS:
        columns |= spread(name, [one[name] for one in measured[count]], 1)
    pairs = list(zip(measured[1], measured[count], strict=True))
    ratios = {
        "whole": [one["whole"] / two["whole"] for one, two in pairs],
        "evaluation": [evaluation(one) / evaluation(two) for one, two in pairs],
        "processor": [one["processor"] / two["processor"] for one, two in pairs],
    }
    for name, values in ratios.items():
        columns |= spread(f"ratio_{name}", values, 2)
    given = ("rows", "max_new_tokens", "batch_size", "pairs")
    words = " ".join(f"--{name} {getattr(options, name)}" for name in given)
    return {
        "processes": count,
        "model": Path(run["recipe"]["model_name_or_path"]).name,
        "rows": options.rows,
        **columns,
        "same_records": "yes",
        **provenance(),
        "command": f"python benchmarks/evaluation_processes.py --run RUN {words}",
    }


def evaluation(seconds: dict[str, float]) -> float:
    """Returns the seconds of what is dealt over the processes."""
    return seconds["likelihoods"] + seconds["answers"]


def spread(name: str, values: list[float], digits: int) -> dict[str, Any]:
    """Returns a median, and the lowest and the highest value beside it."""
    low, middle, high = (
        f"{one:.{digits}f}" for one in (min(values), statistics.median(values), max(values))
    )
    return {name: middle, f"{name}_range": f"{low} to {high}"}


if __name__ == "__main__":
    with mistakes_in_one_line():
        main(sys.argv[1:])
