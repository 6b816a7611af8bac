"""How far the planner's memory and speed are from measured ones: a matrix of models, precisions and strategies on GPUs.

python results/plan_accuracy.py --plan                        (lists the cells, and which were kept out of the fitting)
python results/plan_accuracy.py --measure --gpus 1 [--part 1/2] [--only WORD ...] [--skip WORD ...] [--out X.csv]
python results/plan_accuracy.py --measure --gpus 2 [--out X.csv]
python results/plan_accuracy.py [--measured X.csv ...]      (the table anew: what was measured, and today's planner)

Random-initialised Llama-3.2-1B and Llama-2-7B, recipes/sft.py itself, 12 steps a cell. Rows are `length` tokens each,
so that a micro-batch has rows x length tokens (`mixed`: lognormal lengths up to it). Many cells share a process
(results/plan_worker.py). What X.csv has is not measured again; a cell that ran out of memory is a result. `--part i/n`
takes every n-th cell, for n GPUs at once (CUDA_VISIBLE_DEVICES). `within40`: the allocator is given 40 GB, as on a
smaller GPU. Two cells in five are held out of the fitting, by a hash of their names. `--rehearse`: the same on a CPU
with a tiny shape.
"""

import argparse
import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sftlab.evidence import outcome
from sftlab.launch import exported
from sftlab.run import provenance, read_run
from sftlab.shapes import make_random_files, random_files

ROOT = Path(__file__).parent.parent
SHAPES = {"1b": "llama3.2-1b", "7b": "llama2-7b"}
ATTENTION = ["q_proj", "v_proj", "o_proj"]
TARGETS = {"attn": ATTENTION, "all": [*ATTENTION, "k_proj", "gate_proj", "up_proj", "down_proj"]}
STEPS = 12
ROWS = {"full": 400, "mixed": 3000}
# Seconds without a new cell after which a process has hung.
PATIENCE = 240
QLORA = {
    "load_in_4bit": "true", "use_bnb_nested_quant": "true", "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_quant_storage": "bfloat16",
}  # fmt: skip


class Cell(NamedTuple):
    """One training: micro-batches of `rows` rows of `length` tokens."""

    name: str
    shape: str
    targets: str
    precision: str
    length: int
    rows: int
    strategy: str
    checkpointing: bool = False
    compiled: bool = False
    mixed: bool = False
    rank: int = 16
    accumulation: int = 1
    within_gb: int = 0

    @property
    def gpus(self) -> int:
        """GPUs that it takes."""
        return 1 if self.strategy == "single" else 2

    @property
    def held_out(self) -> bool:
        """Whether it is kept out of the fitting: two in five, by a hash of its name."""
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 5 < 2

    def launch(self) -> tuple[str, dict[str, Any]]:
        """The launch config and accelerate's flags."""
        precision = {"fp32": "no", "nf4": "bf16"}.get(self.precision, self.precision)
        file = {"single": "fp8" if self.precision == "fp8" else "single"}.get(self.strategy, self.strategy)
        if self.precision == "fp8" and self.strategy == "ddp":
            file = "fp8"
        return f"accelerate_configs/{file}.yaml", {"num_processes": self.gpus, "mixed_precision": precision}

    def fields(self) -> dict[str, Any]:
        """The recipe's fields."""
        model, data = files(self)
        fields = {
            "model_name_or_path": model, "dataset_name": data, "dataset_fraction": 1, "max_length": self.length,
            "output_dir": f"runs/plan-{self.name.replace(' ', '_')}", "lora_r": self.rank, "lora_alpha": 2 * self.rank,
            "lora_dropout": 0, "per_device_train_batch_size": self.rows,
            "global_batch_size": self.rows * self.accumulation * self.gpus, "max_steps": STEPS,
            "gradient_checkpointing": self.checkpointing, "compile_layers": self.compiled, "eval_strategy": "no",
            "save_strategy": "no", "overwrite": True, "disable_tqdm": True, "warmup_steps": 2, "logging_steps": 4,
        }  # fmt: skip
        if self.precision == "nf4":
            fields |= QLORA | {"optim": "adamw_torch_fused" if self.strategy == "fsdp" else "paged_adamw_32bit"}
        return fields

    def argv(self) -> list[str]:
        """Arguments of recipes/sft.py."""
        words = [f"--{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in self.fields().items()]
        words += ["--lora_target_modules", *TARGETS[self.targets], "--split_fractions", "0.99", "0", "0.01"]
        return ["--config", "recipes/llama3.2-1b/attn_r16.yaml", *words]


# shape, targets, precision, length x rows, strategy, and what else is not as usual
MATRIX = """
1b attn bf16 512x16 single
1b attn bf16 512x16 single compiled
1b attn bf16 512x16 single checkpointed
1b attn bf16 512x16 single checkpointed compiled
1b all bf16 512x32 single compiled
1b all bf16 1024x8 single
1b attn fp32 512x8 single
1b all fp32 1024x8 single compiled
1b attn fp16 512x32 single
1b all fp16 2048x4 single compiled
1b attn fp8 512x32 single compiled
1b attn fp8 1024x8 single
1b all nf4 512x16 single checkpointed
1b attn nf4 1024x8 single compiled
7b attn bf16 512x8 single compiled
7b all bf16 1024x4 single
7b all nf4 1024x4 single checkpointed compiled
7b all fp8 512x8 single compiled
7b attn fp32 512x4 single
7b all nf4 512x8 single
1b all bf16 2048x4 single checkpointed
1b attn bf16 4096x4 single compiled
1b all bf16 4096x4 single
1b attn bf16 512x64 single compiled mixed
1b all bf16 1024x16 single compiled r64
1b attn fp32 2048x2 single checkpointed
1b all fp32 4096x1 single checkpointed
1b all fp16 4096x2 single checkpointed
1b all fp8 2048x4 single checkpointed compiled
1b all fp8 4096x2 single
7b all bf16 2048x4 single checkpointed
7b attn bf16 4096x1 single
7b all fp16 512x8 single compiled
7b all fp32 1024x2 single checkpointed
7b attn fp8 2048x2 single
7b attn nf4 4096x1 single checkpointed
7b attn nf4 2048x2 single compiled
1b attn bf16 512x8 single compiled accumulated
1b all bf16 4096x8 single within40
7b all bf16 1024x8 single within40
7b all bf16 4096x4 single within80
7b all nf4 4096x8 single compiled
1b attn bf16 512x16 ddp compiled
1b attn bf16 512x16 fsdp compiled
1b all bf16 1024x8 ddp
1b all bf16 1024x8 fsdp
7b attn bf16 1024x4 ddp compiled
7b all bf16 512x8 fsdp compiled
1b attn fp32 512x8 ddp
1b all fp32 512x8 fsdp
1b all fp16 2048x4 ddp checkpointed
1b attn fp16 2048x4 fsdp
1b attn fp8 512x32 ddp compiled
1b all nf4 1024x8 ddp checkpointed
1b all nf4 1024x8 fsdp checkpointed
7b all nf4 512x8 ddp checkpointed compiled
7b all bf16 4096x1 fsdp checkpointed
7b attn bf16 2048x2 fsdp
7b all nf4 1024x4 fsdp checkpointed
1b attn fp8 512x32 fsdp
"""


def parse(line: str) -> Cell:
    """A line of MATRIX."""
    shape, targets, precision, size, strategy, *rest = line.split()
    length, rows = map(int, size.split("x"))
    special: dict[str, Any] = {"checkpointing": "checkpointed" in rest, "compiled": "compiled" in rest}
    special |= {"mixed": "mixed" in rest, "accumulation": 4 if "accumulated" in rest else 1}
    special["rank"] = next((int(word[1:]) for word in rest if word[1:].isdigit()), 16)
    special["within_gb"] = next((int(word[6:]) for word in rest if word.startswith("within")), 0)
    return Cell(line, shape, targets, precision, length, rows, strategy, **special)


CELLS = [parse(line) for line in MATRIX.strip().splitlines()]


def files(cell: Cell) -> tuple[str, str]:
    """The model and the rows of a cell, from the project's folder."""
    found = random_files(SHAPES[cell.shape], cell.length, 16 if cell.mixed else cell.length)
    return tuple(str(path.relative_to(ROOT)) for path in found)


def main() -> None:
    """List, measure, or make the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", action="store_true", help="list the cells")
    parser.add_argument("--measure", action="store_true", help="measure the cells that --out lacks")
    parser.add_argument("--gpus", type=int, choices=(1, 2), default=1, help="measure the cells of so many GPUs")
    parser.add_argument("--part", default="1/1", help="i/n: every n-th cell, from the i-th on")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cells whose name has every word")
    parser.add_argument(
        "--skip", nargs="+", default=[], metavar="WORD", help="not the cells whose name has such a word"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "plan_accuracy_measured.csv")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with a tiny shape")
    arguments = parser.parse_args()
    chosen = [cell for cell in CELLS if set(arguments.only) <= set(words(cell)) - set(arguments.skip)]
    chosen = [cell for cell in chosen if not set(arguments.skip) & set(words(cell))]
    if arguments.plan:
        return print("\n".join(f"{'held out' if cell.held_out else '        '}  {cell.name}" for cell in chosen))
    if arguments.measure:
        part, parts = map(int, arguments.part.split("/"))
        chosen = [cell for cell in chosen if cell.gpus == arguments.gpus][part - 1 :: parts]
        measure(chosen, arguments.out, arguments.gpus, arguments.rehearse)


def words(cell: Cell) -> list[str]:
    """What --only and --skip look for."""
    return [*cell.name.split(), str(cell.length), "held_out" if cell.held_out else "fitted"]


def measure(cells: Sequence[Cell], out: Path, gpus: int, rehearse: bool) -> None:
    """Measure what `out` lacks, a process after the other until all is there."""
    if rehearse:
        SHAPES.update(dict.fromkeys(SHAPES, "tiny"))
    for cell in cells:
        make_random_files(
            SHAPES[cell.shape], cell.length, *((ROWS["mixed"], 16) if cell.mixed else (ROWS["full"], cell.length))
        )
    about = provenance()
    while left := [cell for cell in cells if cell.name not in {line["cell"] for line in read(out)}]:
        with tempfile.TemporaryDirectory() as folder:
            worker = start(left, gpus, rehearse, Path(folder))
            follow(worker, left, out, Path(folder), about)


def start(cells: Sequence[Cell], gpus: int, rehearse: bool, folder: Path) -> subprocess.Popen:
    """A worker for the cells."""
    listed = []
    for cell in cells:
        file, flags = cell.launch()
        if rehearse:
            file, flags = f"accelerate_configs/{'cpu' if gpus == 1 else 'cpu_ddp'}.yaml", {}
        (ROOT / cell.fields()["output_dir"] / "run.json").unlink(missing_ok=True)
        variables = {k: v for k, v in exported(ROOT / file, flags).items() if k.startswith(("ACCELERATE_", "FSDP_"))}
        argv = cell.argv() + (
            ["--compile_layers=false", "--load_in_4bit=false", "--optim=adamw_torch"] if rehearse else []
        )
        listed.append({"name": cell.name, "variables": variables, "argv": argv, "limit_gb": cell.within_gb})
    (folder / "cells.json").write_text(json.dumps(listed), encoding="utf-8")
    # under fsdp.yaml the process group speaks for GPUs and CPUs, which serves DDP too
    launch = ("cpu" if gpus == 1 else "cpu_ddp") if rehearse else ("single" if gpus == 1 else "fsdp")
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", f"accelerate_configs/{launch}.yaml", "--num_processes", str(gpus)]
    command += ["results/plan_worker.py", "--cells", str(folder / "cells.json"), "--out", str(folder / "lines.jsonl")]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True)


def follow(worker: subprocess.Popen, cells: Sequence[Cell], out: Path, folder: Path, about: dict[str, str]) -> None:
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
                append(out, row(cells[done], {"raised": "hung" if hung else f"exit {worker.returncode}"}, about))
            elif done == 0:
                sys.exit(f"error: the worker ended with {worker.returncode} before its first cell")
            break
        time.sleep(0.5)
    worker.wait()


def row(cell: Cell, facts: dict[str, Any], about: dict[str, str]) -> dict[str, Any]:
    """What was measured of a cell; GB are 2**30 bytes, memory that of the rank with the most."""
    record = ROOT / cell.fields()["output_dir"] / "run.json"
    run = read_run(record.parent) if record.is_file() else {"status": "failed", "reason": facts["raised"]}
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
            "loaded_gb", "loading_peak_gb", "largest_tokens", "largest_loss_tokens", "held_before_gb", "seconds")},
        "linear": run.get("ran", {}).get("compute", {}).get("linear"),
        "attention": run.get("ran", {}).get("attn_implementation"),
        "all_ranks_gb": " ".join(str(rank.get("allocated_gb")) for rank in ranks),
        "limit_tflops_per_s": measured.get("limit_tflops_per_s"),
        **about,
    }  # fmt: skip


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


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
