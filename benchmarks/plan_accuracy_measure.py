"""Measures the cells that benchmarks/plan_accuracy.py compares with plans, on one GPU or two.

python benchmarks/plan_accuracy_measure.py --list             # the cells, and which are held out
python benchmarks/plan_accuracy_measure.py --gpus 1 [--part 1/2] [--only WORD ...] \
    [--skip WORD ...] [--rehearse] [--out results/plan_accuracy]
python benchmarks/plan_accuracy_measure.py --gpus 2

The models are random-initialised Llama-3.2-1B and Llama-2-7B shapes, trained by recipes/sft.py for
12 steps a cell. Rows have `length` tokens each, so a micro-batch has rows x length tokens; `mixed`
cells have lognormal lengths up to it. Under `within40` the allocator gets 40 GB, as on a smaller
GPU. Many cells share a process (benchmarks/plan_accuracy_worker.py).

Writes measured.csv. Cells that it has are not measured again; a cell that ran out of memory is a
result. `--part i/n` takes every n-th cell, for n GPUs at once (CUDA_VISIBLE_DEVICES). `--rehearse`
trains a tiny shape on a CPU.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftlab.comparison.run_results import outcome
from sftlab.config.launch import exported
from sftlab.config.launch_command import as_arguments, launch_command
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.models.random_models import make_random_files
from sftlab.paths import ROOT
from sftlab.planning.accuracy_cells import CELL_SHAPES, CELLS, Cell
from sftlab.runs.environment import provenance
from sftlab.runs.run_directory import read_run
from sftlab.script_options import Options
from sftlab.tables import read_csv

# Seconds without a new cell after which a process has hung.
PATIENCE = 240
# Columns out of run.json, and out of what the worker adds to it.
STEP_MEMORY = ["parameters_gb", "gradients_gb", "optimizer_state_gb", "activations_gb", "peak_gb"]
WORKER_FACTS = [
    *("loaded_gb", "loading_peak_gb", "largest_tokens", "largest_loss_tokens"),
    *("held_before_gb", "seconds", "host_us"),
]
REHEARSED = ["--compile_layers=false", "--load_in_4bit=false", "--optim=adamw_torch"]


def main() -> None:
    """List the cells, or measure those that the table lacks."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="list the cells, measure nothing")
    parser.add_argument(
        "--gpus", type=int, choices=(1, 2), default=1, help="measure the cells of so many GPUs"
    )
    parser.add_argument("--part", default="1/1", help="i/n: every n-th cell, from the i-th on")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="cells whose name has every word"
    )
    parser.add_argument(
        "--skip", nargs="+", default=[], metavar="WORD", help="no cells whose name has such a word"
    )
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with a tiny shape")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "plan_accuracy")
    arguments = parser.parse_args()
    only, skip = set(arguments.only), set(arguments.skip)
    chosen = [cell for cell in CELLS if only <= set(words(cell)) and not skip & set(words(cell))]
    if arguments.list:
        for cell in chosen:
            print(f"{'held out' if cell.held_out else '':8}  {cell.name}")
        return
    part, parts = map(int, arguments.part.split("/"))
    chosen = [cell for cell in chosen if cell.gpus == arguments.gpus][part - 1 :: parts]
    arguments.out.mkdir(parents=True, exist_ok=True)
    measure(chosen, arguments.out / "measured.csv", arguments.gpus, arguments.rehearse)


def words(cell: Cell) -> list[str]:
    """Returns the words that --only and --skip look for."""
    return [*cell.name.split(), str(cell.length), "held_out" if cell.held_out else "fitted"]


def measure(cells: Sequence[Cell], out: Path, gpus: int, rehearse: bool) -> None:
    """Measure the cells that the table `out` lacks, one process after the other."""
    if rehearse:
        CELL_SHAPES.update(dict.fromkeys(CELL_SHAPES, "tiny"))
    for cell in cells:
        shape, longest, shortest = cell.files()
        make_random_files(shape, longest, 3000 if cell.mixed else 400, shortest)
    about = provenance()
    while left := [
        cell for cell in cells if cell.name not in {line["cell"] for line in read_csv(out)}
    ]:
        with tempfile.TemporaryDirectory() as folder:
            together = [cell for cell in left if launch_config(cell) == launch_config(left[0])]
            worker = start(together, gpus, rehearse, Path(folder))
            follow(worker, together, out, Path(folder), about)


def start(cells: Sequence[Cell], gpus: int, rehearse: bool, folder: Path) -> subprocess.Popen:
    """Start a worker for the cells."""
    listed = []
    for cell in cells:
        file, flags = cell.launch()
        if rehearse:
            file, flags = f"accelerate_configs/{'cpu' if gpus == 1 else 'cpu_ddp'}.yaml", {}
        (ROOT / cell.fields()["output_dir"] / "run.json").unlink(missing_ok=True)
        variables = {
            k: v
            for k, v in exported(ROOT / file, flags).items()
            if k.startswith(("ACCELERATE_", "FSDP_"))
        }
        argv = cell.argv() + (REHEARSED if rehearse else [])
        listed.append(
            {"name": cell.name, "variables": variables, "argv": argv, "limit_gb": cell.within_gb}
        )
    (folder / "cells.json").write_text(json.dumps(listed), encoding="utf-8")
    config = ("cpu" if gpus == 1 else "cpu_ddp") if rehearse else launch_config(cells[0])
    files = {"cells": folder / "cells.json", "out": folder / "lines.jsonl"}
    script, flags = "benchmarks/plan_accuracy_worker.py", ["--num_processes", str(gpus)]
    command = launch_command(config, script, as_arguments(files), flags)
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True)


def launch_config(cell: Cell) -> str:
    """Returns the worker's launch config.

    Under fsdp.yaml the process group has a backend for GPUs and one for CPUs, which serves DDP too.
    """
    return "single" if cell.strategy == "single" else "fsdp"


def follow(
    worker: subprocess.Popen, cells: Sequence[Cell], out: Path, folder: Path, about: dict[str, str]
) -> None:
    """Write a row a cell as the worker goes on, and one for the cell at which it died."""
    lines, done, last = folder / "lines.jsonl", 0, time.monotonic()
    while done < len(cells):
        ended = worker.poll() is not None
        found = lines.read_text(encoding="utf-8").splitlines() if lines.is_file() else []
        for line in found[done:]:
            append(out, row(cells[done], json.loads(line), about))
            done, last = done + 1, time.monotonic()
        hung = time.monotonic() - last > PATIENCE + 120 * (done == 0)
        if hung:
            os.killpg(worker.pid, signal.SIGKILL)
        if (ended or hung) and done < len(cells):
            begun = folder / "begun"
            if hung or (begun.is_file() and begun.read_text(encoding="utf-8") == cells[done].name):
                append(
                    out,
                    row(
                        cells[done],
                        {"raised": "hung" if hung else f"exit {worker.returncode}"},
                        about,
                    ),
                )
            elif done == 0:
                sys.exit(f"error: the worker ended with {worker.returncode} before its first cell")
            break
        time.sleep(0.5)
    worker.wait()


def row(cell: Cell, facts: dict[str, Any], about: dict[str, str]) -> dict[str, Any]:
    """Returns what was measured of a cell: GB of 2**30 bytes, of the rank with the most."""
    record = ROOT / cell.fields()["output_dir"] / "run.json"
    run = (
        read_run(record.parent)
        if record.is_file()
        else {"status": "failed", "reason": facts["raised"]}
    )
    raised = facts.pop("raised")
    if run["status"] == "running":
        run |= {"status": "failed", "reason": raised}
    status, reason = outcome(run)
    if raised and status == "succeeded":
        status, reason = "failed", raised
    measured = run.get("measured", {})
    ranks = measured.get("peak_memory") or [{}]
    top = max(ranks, key=lambda rank: rank.get("allocated_gb", 0))
    step, ran = top.get("step", {}), run.get("ran", {})
    return {
        "cell": cell.name,
        "status": status,
        "reason": reason or "",
        "tokens_per_s": measured.get("tokens_per_s"),
        "step_time_s": measured.get("step_time_s"),
        "peak_allocated_gb": top.get("allocated_gb"),
        "peak_reserved_gb": top.get("reserved_gb"),
        **{name: step.get(name) for name in STEP_MEMORY},
        **{name: facts.get(name) for name in WORKER_FACTS},
        "linear": ran.get("compute", {}).get("linear"),
        "attention": ran.get("attn_implementation"),
        "all_ranks_gb": " ".join(str(rank.get("allocated_gb")) for rank in ranks),
        "limit_tflops_per_s": measured.get("limit_tflops_per_s"),
        **about,
    }


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a row to a table, and before the first the heading."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(line), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(line)


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
