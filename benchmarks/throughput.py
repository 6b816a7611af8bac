"""Training throughput of this project, of its peers and of the published loop on one or more GPUs.

python benchmarks/throughput.py [--variants NAME ...] [--repeats 3] [--out results/throughput]
CUDA_VISIBLE_DEVICES=0,1 python benchmarks/throughput.py      # into results/throughput_2gpus
python benchmarks/throughput.py --peers --gb 135              # into results/peers
python benchmarks/throughput.py --families --gb 135 [--only Qwen3-1.7B]    # results/families
python benchmarks/throughput.py --draw                        # the plot again, from the table
python benchmarks/throughput.py --fused_lora --out results/fused_lora     # its pairs alone
python benchmarks/throughput.py --captured_step                # into results/captured_step

The models are random-initialised: Llama-3.2-1B's shape, Llama-2-7B's for QLoRA, and those that
variants name. Rows have 16 to 512 tokens, lognormal(5.75, 0.7), unless the variant's name says
otherwise; their words have one token each. LoRA has r=16 on q, v and o. A step has 32 rows unless
the name says otherwise, and 20 under trl and the published loop. A packed row of a peer is full.

Every variant is a process of its own (benchmarks/throughput_worker.py). As many as fit the GPU's
memory start at once and warm up. Then they train one at a time, `--repeats` times round, so that
every repeat has one turn of each. `sft.py` variants are recipes/sft.py itself, with TensorBoard.
DDP and FSDP2 take every GPU, with as much work for each. Two GPUs are compared with one.

Only tokens that are not padding count. MFU is model FLOPs over the rate of a bf16 matrix product
measured in the same command: 4 FLOPs for each frozen parameter and token, 6 for a trained one, the
head at the tokens in the loss alone. `parts` says what ran. Where a worker fails, or is not ready
after `--patience` seconds, `note` has the reason and the others go on. After `--seconds` the
command ends with what it has. One more turn of the default's `sft.py` variants is profiled by class
of kernel. Writes throughput.csv (after every turn), profile.csv and throughput.png.
"""

import argparse
import itertools
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sftlab.config.launch_command import as_arguments, launch_command
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.measurement.committed_speeds import FAILED
from sftlab.measurement.hardware_limit import matrix_rate
from sftlab.measurement.throughput_variants import (
    CAPTURED,
    EVERY,
    FAMILIES,
    FUSED_LORA,
    PEERS,
    VARIANTS,
    Variant,
)
from sftlab.measurement.turn_workers import (
    Limits,
    Worker,
    awaited,
    end,
    log_of,
    reason,
    take_turn,
    told_its_command,
)
from sftlab.models.random_models import make_random_files, random_files
from sftlab.paths import ROOT
from sftlab.runs.environment import provenance
from sftlab.script_options import Options
from sftlab.tables import write_csv

# Rows of a file: of full rows few are read, and each takes long to encode.
ROWS, FULL_ROWS = 3000, 400
# packages that the peers are, and take
OTHERS = ("unsloth", "flash-attn", "liger-kernel", "flash-linear-attention")


@dataclass
class Found:
    """What a variant's worker reported, and why there is no more of it."""

    reports: list[dict[str, Any]] = field(default_factory=list)
    kernels: dict[str, float] | None = None
    note: str = ""


def main() -> None:
    """Make models and rows, run the variants, and write a row for each."""
    started = time.monotonic()
    # workers live in sessions of their own, and would live on
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    arguments = parse_arguments()
    if arguments.draw:
        draw(arguments.out)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    limits = Limits(arguments.patience, started + arguments.seconds, started)
    chosen: dict[str, Variant] = arguments.chosen
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate, about = matrix_rate(device, torch.bfloat16), provenance(OTHERS)
    found: dict[str, Found] = {}

    def write() -> None:
        rows = [summary(name, chosen[name], one, rate) | about for name, one in found.items()]
        write_table(arguments.out / "throughput.csv", rows)
        profiles = {name: one.kernels for name, one in found.items() if one.kernels}
        if profiles:
            lines = [{"variant": name} | kernels for name, kernels in profiles.items()]
            write_table(arguments.out / "profile.csv", lines)

    for group in groups(chosen, arguments.gb):
        mine = {name: chosen[name] for name in group}
        if limits.over():
            note = f"not reached in {arguments.seconds:.0f} s"
            found |= {name: Found(note=note) for name in group}
        else:
            found |= {name: Found() for name in group}
            make_files(mine, found)
            with tempfile.TemporaryDirectory() as folder:
                drive(mine, found, arguments.repeats, Path(folder), limits, write)
        write()
    if any(one.reports for one in found.values()):
        draw(arguments.out)
    else:
        print("no variant was measured")


def parse_arguments() -> argparse.Namespace:
    """Returns the command line, with the variants asked for as `chosen`.

    On several GPUs the variants that take them all are the default.
    """
    several = [name for name, variant in VARIANTS.items() if variant.on_all_gpus]
    default = [name for name in VARIANTS if name not in several]
    count, folder = torch.cuda.device_count(), "throughput"
    if count > 1:
        default = ["sft.py bf16", "sft.py fp8", "sft.py bf16, 64 rows", *several]
        folder = f"throughput_{count}gpus"
    parser = Options(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--variants", nargs="+", choices=EVERY, metavar="NAME")
    sets = {
        "fused_lora": (FUSED_LORA, "pairs with and without fused LoRA"),
        "captured_step": (CAPTURED, "pairs with and without captured steps"),
        "peers": (PEERS, "the fastest other trainers at their best, beside sft.py"),
        "families": (FAMILIES, "sft.py and these peers on models of other families"),
    }
    for name, (_, about) in sets.items():
        which.add_argument(f"--{name}", dest="set", action="store_const", const=name, help=about)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="variants whose name has a TEXT")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns of each variant")
    parser.add_argument(
        "--gb", type=int, default=130, help="memory of a GPU that a group of variants may reserve"
    )
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="end after so many, with what there is"
    )
    parser.add_argument(
        "--patience", type=float, default=600, help="seconds that a group may take to warm up"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--draw", action="store_true", help="draw the table of --out, measure nothing"
    )
    given = parser.parse_args()
    named = given.variants or default
    given.chosen = sets[given.set][0] if given.set else {name: EVERY[name] for name in named}
    if given.only:
        given.chosen = {
            name: one for name, one in given.chosen.items() if any(t in name for t in given.only)
        }
        if not given.chosen:
            parser.error(f"no variant has {' or '.join(given.only)} in its name")
    given.out = given.out or ROOT / "results" / (given.set or folder)
    return given


def draw(folder: Path) -> None:
    """Draw a folder's table."""
    command = [sys.executable, "benchmarks/draw.py", str(folder.resolve())]
    subprocess.run(command, cwd=ROOT, check=True)


def groups(variants: Mapping[str, Variant], gb: int) -> list[list[str]]:
    """Returns the names of the variants in their order, as many to a group as fit the memory.

    Variants of one model that fit together are not torn apart.
    """
    found: list[list[str]] = [[]]
    for _, names in itertools.groupby(variants, lambda name: variants[name].shape):
        block = list(names)
        whole = sum(variants[name].gb for name in block)
        for name in block:
            used = sum(variants[other].gb for other in found[-1])
            more = whole if whole <= gb and name == block[0] else variants[name].gb
            if used + more > gb and found[-1]:
                found.append([])
            found[-1].append(name)
    return found


def make_files(variants: Mapping[str, Variant], found: Mapping[str, Found]) -> None:
    """Make the model and the rows of each variant that can run; says why one has none."""
    for name, one in variants.items():
        missing = one.missing()
        if missing:
            found[name].note = f"not installed here: {', '.join(missing)}"
            continue
        count = FULL_ROWS if one.shortest == one.longest else ROWS
        try:
            make_random_files(one.shape, one.longest, count, one.shortest)
        except (OSError, RuntimeError) as error:  # a full disk, a full GPU
            found[name].note = reason(f"{type(error).__name__}: {error}")


def drive(
    variants: Mapping[str, Variant],
    found: Mapping[str, Found],
    repeats: int,
    folder: Path,
    limits: Limits,
    write: Callable[[], None],
) -> None:
    """Start a worker for each variant, then let them train in turn, `repeats` times.

    Reports go to `found`, and `write` is called after each. A variant with a note is left out, and
    one that gets a note is ended.
    """
    workers: dict[str, Worker] = {}
    try:
        for number, (name, variant) in enumerate(variants.items()):
            mine = folder / str(number)
            if not found[name].note:
                mine.mkdir()
                workers[name] = Worker(mine, start(variant, repeats, mine), time.monotonic())
        until = limits.until(limits.patience)
        for name, worker in workers.items():
            found[name].note = awaited(worker, "ready0", until, limits) or ""
        ready = sum(not found[name].note for name in workers)
        print(f"{ready} of {len(variants)} ready after {limits.passed():.0f} s", flush=True)
        for turn in range(repeats + 1):
            for name, worker in workers.items():
                one, more = found[name], turn < repeats or variants[name].profiled
                if one.note and worker.process.poll() is None:
                    end(worker)
                if one.note or not more or limits.over():
                    continue
                one.note = take_turn(worker, turn, limits) or ""
                if not one.note:
                    report = json.loads((worker.folder / f"done{turn}").read_text("utf-8"))
                    if turn < repeats:
                        one.reports.append(report)
                    one.kernels = report.get("kernels")
                    print(f"{name}: {report['tokens_per_s']:.0f} tokens/s", flush=True)
                    write()
    finally:
        for name, worker in workers.items():
            end(worker)
            if not found[name].note and not found[name].reports:
                found[name].note = "the time was up before its first turn"
            if found[name].note:
                own = log_of(worker).partition("torch/distributed/elastic")[0]  # the launcher's
                print(f"{name}: {found[name].note}\n{own[-1500:]}", flush=True)


def start(variant: Variant, repeats: int, folder: Path) -> subprocess.Popen:
    """Start the worker of a variant, on one GPU or on all."""
    processes = gpus(variant)
    fields = dict(variant.fields)
    if variant.kind == "sft":
        fields["global_batch_size"] = fields["per_device_train_batch_size"] * processes
    base, rows = random_files(variant.shape, variant.longest, variant.shortest)
    words = as_arguments({"kind": variant.kind, "fields": json.dumps(fields)})
    words += as_arguments({"base": base, "rows": rows, "turns": repeats, "folder": folder})
    steps = {"warm": variant.warm, "steps": variant.steps, "profiled": int(variant.profiled)}
    words += as_arguments({name: count for name, count in steps.items() if count is not None})
    flags = ["--num_processes", str(processes)]
    # with a compiler process for every core, a group would have hundreds
    environment = told_its_command() | {"TORCHINDUCTOR_COMPILE_THREADS": "4"}
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            launch_command(variant.launch, "benchmarks/throughput_worker.py", words, flags),
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def gpus(variant: Variant) -> int:
    """Returns how many GPUs a variant takes."""
    return torch.cuda.device_count() if variant.on_all_gpus else 1


def summary(name: str, variant: Variant, found: Found, rate: float) -> dict[str, Any]:
    """Returns the row of a variant: median and range over the repeats, peak GB of one GPU.

    The cells of a variant that failed are empty, but for its note.
    """
    reports, count = found.reports, gpus(variant)
    row: dict[str, Any] = {"variant": name, "shape": variant.shape, "gpus": count}
    row["tokens_per_s"] = FAILED
    columns = ("lowest", "highest", "rows_per_s", "tokens_per_step", "share_of_limit", "peak_gb")
    row |= dict.fromkeys((*columns, "loss"), "")
    if reports:
        tokens = sorted(report["tokens_per_s"] for report in reports)
        work = statistics.median(report["model_flops_per_s"] for report in reports)
        row |= {
            "tokens_per_s": round(statistics.median(tokens)),
            "lowest": round(tokens[0]),
            "highest": round(tokens[-1]),
            "rows_per_s": round(statistics.median(r["rows_per_s"] for r in reports), 1),
            "tokens_per_step": round(statistics.median(r["tokens_per_step"] for r in reports)),
            "share_of_limit": round(work / rate / count, 3),
            "peak_gb": max(report["peak_gb"] for report in reports),
            "loss": reports[-1]["loss"],
        }
    row |= {"matrix_tflops_per_s": round(rate / 1e12, 1), "repeats": len(reports)}
    return row | {"parts": reports[-1]["parts"] if reports else "", "note": found.note}


def write_table(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write rows as CSV, figures rounded to three decimals."""
    write_csv(
        path,
        [
            {k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()}
            for line in lines
        ],
    )


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
