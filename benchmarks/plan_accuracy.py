"""How far the planner's memory and speed are from measured ones: a matrix of models, precisions and
strategies on GPUs.

python benchmarks/plan_accuracy.py --plan                        (lists the cells, and which were kept out of the fitting)
python benchmarks/plan_accuracy.py --measure --gpus 1 [--part 1/2] [--only WORD ...] [--skip WORD ...] [--out X.csv]
python benchmarks/plan_accuracy.py --measure --gpus 2 [--out X.csv]
python benchmarks/plan_accuracy.py [--measured X.csv ...]      (the table by today's planner, X.csv's cells for its own)

Random-initialised Llama-3.2-1B and Llama-2-7B, recipes/sft.py itself, 12 steps a cell. Rows are
`length` tokens each, so that a micro-batch has rows x length tokens (`mixed`: lognormal lengths up
to it). Many cells share a process (benchmarks/plan_accuracy_worker.py). What X.csv has is not
measured again; a cell that ran out of memory is a result. `--part i/n` takes every n-th cell, for n
GPUs at once (CUDA_VISIBLE_DEVICES). `within40`: the allocator is given 40 GB, as on a smaller GPU.
sftlab/planning/accuracy_cells.py says which cells are held out of the fitting; on GPUs other than
the H200 all are (`extrapolated`). Speeds count where the host's was measured (`host_us`), for a
plan goes by it. `--rehearse`: the same on a CPU with a tiny shape.
"""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from transformers import LlamaConfig

from sftlab.comparison.run_results import outcome
from sftlab.config.launch import exported, launched
from sftlab.config.parser import parse_recipe
from sftlab.models.random_models import MODEL_SHAPES
from sftlab.models.random_models import make_random_files, random_lengths
from sftlab.planning.accuracy_cells import CELLS, CELL_SHAPES, Cell
from sftlab.planning.gpu_specs import GPU, GPUS, HOST_US, MEASURED_ON, gpu_seen_as
from sftlab.planning.plan import LIMITS, RowLengths, foresee, of_lengths
from sftlab.planning.step_memory import FRAGMENTATION, memory
from sftlab.runs.environment import provenance
from sftlab.runs.run_directory import read_run
from sftlab.tables import read_csv, write_csv

ROOT = Path(__file__).parent.parent
# Seconds without a new cell after which a process has hung.
PATIENCE = 240


def main() -> None:
    """List, measure, or make the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", action="store_true", help="list the cells")
    parser.add_argument("--measure", action="store_true", help="measure the cells that --out lacks")
    parser.add_argument(
        "--gpus", type=int, choices=(1, 2), default=1, help="measure the cells of so many GPUs"
    )
    parser.add_argument("--part", default="1/1", help="i/n: every n-th cell, from the i-th on")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="cells whose name has every word"
    )
    parser.add_argument(
        "--skip",
        nargs="+",
        default=[],
        metavar="WORD",
        help="not the cells whose name has such a word",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "plan_accuracy_measured.csv")
    parser.add_argument(
        "--measured",
        type=Path,
        nargs="+",
        default=[],
        help="what --measure wrote, a file a host: into the table",
    )
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with a tiny shape")
    arguments = parser.parse_args()
    chosen = [
        cell for cell in CELLS if set(arguments.only) <= set(words(cell)) - set(arguments.skip)
    ]
    chosen = [cell for cell in chosen if not set(arguments.skip) & set(words(cell))]
    if arguments.plan:
        return print(
            "\n".join(
                f"{'held out' if cell.held_out else '        '}  {cell.name}" for cell in chosen
            )
        )
    if arguments.measure:
        part, parts = map(int, arguments.part.split("/"))
        chosen = [cell for cell in chosen if cell.gpus == arguments.gpus][part - 1 :: parts]
        return measure(chosen, arguments.out, arguments.gpus, arguments.rehearse)
    table = ROOT / "results" / "plan_accuracy" / "plan_accuracy.csv"
    measured = newest(table, arguments.measured)
    found = [
        (cell, measured[cell.name, name])
        for name in GPUS
        for cell in CELLS
        if (cell.name, name) in measured
    ]
    lines = [predicted(cell, line) for cell, line in found]
    write_csv(table, [*lines, *published()])
    print(summary(lines))
    return None


def newest(table: Path, measured: Sequence[Path]) -> dict[tuple[str, str], dict[str, str]]:
    """The rows of a table by cell and GPU, those of --measure in the place of older ones."""
    found = [read_csv(table), *(on_one_host(read_csv(path)) for path in measured)]
    return {
        (line["cell"], gpu.name): line
        for lines in found
        for line in lines
        if (gpu := measured_on(line))
    }


def measured_on(line: Mapping[str, str]) -> GPU | None:
    """The GPU of a row, on a host of the row's speed; None for what was published.

    ValueError where it is not known.
    """
    if not line["hardware"]:
        return None
    if gpu := gpu_seen_as(line["hardware"]):
        return replace(gpu, host_us=float(line["host_us"] or HOST_US))
    raise ValueError(
        f"{line['cell']}: no figures for {line['hardware']}, known are {', '.join(GPUS)}"
    )


def on_one_host(lines: list[dict[str, str]]) -> list[dict[str, str]]:
    """A command's rows: its host's speed is the median of what its cells saw, which vary by a third
    either way.
    """
    seen = [float(line["host_us"]) for line in lines if line.get("host_us")]
    return [line | {"host_us": round(median(seen), 2)} for line in lines] if seen else lines


def predicted(cell: Cell, line: Mapping[str, str]) -> dict[str, Any]:
    """A measured row, and beside it what the planner of today says of the cell."""
    file, flags = cell.launch()
    shape, gpu = CELL_SHAPES[cell.shape], measured_on(line)
    rows = of_lengths(random_lengths(3000, *cell.files()[1:]), None, "the cell's")
    with launched(exported(ROOT / file, flags)) as launch:
        recipe = parse_recipe(cell.argv(), launch)
        forecast = foresee(recipe, LlamaConfig(**MODEL_SHAPES[shape]), launch, gpu, rows)
    peak, speed = forecast.memory.allocated / 2**30, forecast.tokens_per_s
    limit = cell.within_gb or gpu.memory_gb
    facts = {
        "predicted_peak_gb": round(peak, 3),
        "predicted_tokens_per_s": round(speed),
        "limit_gb": limit,
    }
    ran_out = line["status"] == "out of memory"
    facts["predicted_fits"] = "yes" if peak * (1 + FRAGMENTATION) <= limit else "no"
    facts["fits"] = "no" if ran_out else "yes" if line["status"] == "succeeded" else ""
    # a plan of speed is for a host of a given speed: where nobody measured it, plan and cell stand
    # beside each other
    judged = line["tokens_per_s"] if line["host_us"] else ""
    for name, ours, theirs in (
        ("memory", peak, line["peak_allocated_gb"]),
        ("speed", speed, judged),
    ):
        facts[f"{name}_error"] = round(ours / float(theirs) - 1, 4) if theirs else ""
    made = {name for name in line if name.startswith("predicted")} | {
        "held_out",
        "memory_error",
        "speed_error",
    }
    kept = {name: value for name, value in line.items() if name not in made | set(facts) | {"cell"}}
    held_out = "extrapolated" if gpu.name != MEASURED_ON else "yes" if cell.held_out else "no"
    return {"cell": cell.name, "held_out": held_out, **facts, **kept}


def published() -> list[dict[str, Any]]:
    """The peaks of the published 1B study (H100), and what the planner says, told its settings.

    Rows padded to 512, float32 weights, LoRA r=16 on q, v and o, and a loss with label smoothing
    over whole logits: itself, log-probabilities and three gradients in float32. GB are taken for
    10**9 bytes there, and here; were they 2**30, the errors would be 7 % lower.
    """
    lines = []
    for file, rows, peak in (("fp32", 20, 57.6588), ("fp16", 20, 45.6404), ("fp16", 24, 55.5422)):
        fields = [
            "--dtype=float32",
            "--packing=false",
            "--compile_layers=false",
            f"--per_device_train_batch_size={rows}",
        ]
        argv = [
            "--config",
            "recipes/llama3.2-1b/attn_r16.yaml",
            *fields,
            "--global_batch_size=0",
            "--lora_dropout=0",
        ]
        with launched(exported(ROOT / f"accelerate_configs/{file}.yaml", {})) as launch:
            recipe, lengths = parse_recipe(argv, launch), RowLengths(None, 512, 0, 512, "padded")
            config = LlamaConfig(**MODEL_SHAPES["llama3.2-1b"])
            step = foresee(recipe, config, launch, GPUS["h100-80"], lengths).step
        ours = memory(replace(step, whole_logits=5.0)).allocated / 1e9
        lines.append(
            {
                "cell": f"published {file}, batch {rows}",
                "held_out": "published",
                "predicted_peak_gb": round(ours, 1),
            }
        )
        lines[-1] |= {"peak_allocated_gb": peak, "memory_error": round(ours / peak - 1, 4)}
    return lines


def summary(lines: Sequence[Mapping[str, Any]]) -> str:
    """Cells near enough, fitted, held out and on other GPUs apart, and the worst.

    Speeds of unknown hosts apart.
    """
    said = []
    for name, limit in LIMITS.items():
        for held_out, title in (
            ("no", "fitted"),
            ("yes", "held out"),
            ("extrapolated", "other GPUs"),
        ):
            errors = [(x[f"{name}_error"], x["cell"]) for x in lines if x["held_out"] == held_out]
            errors = sorted((x for x in errors if x[0] != ""), key=lambda x: -abs(x[0]))
            far = [f"    {error:+.1%}  {cell}" for error, cell in errors if abs(error) > limit]
            if errors:
                said += [
                    f"{name}, {title}: {len(errors) - len(far)} of {len(errors)} within "
                    f"{limit:.0%}",
                    *far,
                ]
    aside = [x for x in lines if x["tokens_per_s"] and not x["host_us"]]
    near = sum(
        abs(x["predicted_tokens_per_s"] / float(x["tokens_per_s"]) - 1) <= LIMITS["speed"]
        for x in aside
    )
    if aside:
        within = f"{near} of {len(aside)} within {LIMITS['speed']:.0%}"
        said.append(f"speed, on hosts of unknown speed, not counted: {within}")
    wrong = [x["cell"] for x in lines if x["fits"] == "no" and x["predicted_fits"] == "yes"]
    return "\n".join([*said, f"said to fit, but ran out of memory: {', '.join(wrong) or 'none'}"])


def words(cell: Cell) -> list[str]:
    """What --only and --skip look for."""
    return [*cell.name.split(), str(cell.length), "held_out" if cell.held_out else "fitted"]


def measure(cells: Sequence[Cell], out: Path, gpus: int, rehearse: bool) -> None:
    """Measure what `out` lacks, a process after the other until all is there."""
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
    """A worker for the cells."""
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
        argv = cell.argv() + (
            ["--compile_layers=false", "--load_in_4bit=false", "--optim=adamw_torch"]
            if rehearse
            else []
        )
        listed.append(
            {"name": cell.name, "variables": variables, "argv": argv, "limit_gb": cell.within_gb}
        )
    (folder / "cells.json").write_text(json.dumps(listed), encoding="utf-8")
    launch = ("cpu" if gpus == 1 else "cpu_ddp") if rehearse else launch_config(cells[0])
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", f"accelerate_configs/{launch}.yaml", "--num_processes", str(gpus)]
    command += [
        "benchmarks/plan_accuracy_worker.py",
        "--cells",
        str(folder / "cells.json"),
        "--out",
        str(folder / "lines.jsonl"),
    ]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True)


def launch_config(cell: Cell) -> str:
    """The worker's: under fsdp.yaml the process group speaks for GPUs and CPUs, which serves DDP
    too.
    """
    return "single" if cell.strategy == "single" else "fsdp"


def follow(
    worker: subprocess.Popen, cells: Sequence[Cell], out: Path, folder: Path, about: dict[str, str]
) -> None:
    """Write a row a cell as the worker goes; the cell at which it died has a row too."""
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
    """What was measured of a cell; GB are 2**30 bytes, memory that of the rank with the most."""
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
    return {
        "cell": cell.name, "status": status, "reason": reason or "",
        "tokens_per_s": measured.get("tokens_per_s"), "step_time_s": measured.get("step_time_s"),
        "peak_allocated_gb": top.get("allocated_gb"), "peak_reserved_gb": top.get("reserved_gb"),
        **{name: top.get("step", {}).get(name) for name in (
            "parameters_gb", "gradients_gb", "optimizer_state_gb", "activations_gb", "peak_gb")},
        **{name: facts.get(name) for name in (
            "loaded_gb", "loading_peak_gb", "largest_tokens", "largest_loss_tokens", "held_before_gb", "seconds",
            "host_us")},
        "linear": run.get("ran", {}).get("compute", {}).get("linear"),
        "attention": run.get("ran", {}).get("attn_implementation"),
        "all_ranks_gb": " ".join(str(rank.get("allocated_gb")) for rank in ranks),
        "limit_tflops_per_s": measured.get("limit_tflops_per_s"),
        **about,
    }  # fmt: skip


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a row, and before the first the heading."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(line), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(line)


if __name__ == "__main__":
    main()
