"""Training throughput of this project, of trl and of the published loop on one GPU or several.

python benchmarks/throughput.py [--variants NAME ...] [--repeats 3] [--out results/throughput]
CUDA_VISIBLE_DEVICES=0,1 python benchmarks/throughput.py      # into results/throughput_2gpus
python benchmarks/throughput.py --draw                        # the plot again, from the table
python benchmarks/throughput.py --fused_lora --out results/fused_lora     # its pairs alone

The models are random-initialised: Llama-3.2-1B's shape, Llama-2-7B's for QLoRA. Rows have 16 to
512 tokens, lognormal(5.75, 0.7), unless the variant's name says otherwise; their words have one
token each. LoRA has r=16 on q, v and o. A step has 32 rows unless the name says otherwise, and 20
under trl and the published loop.

Every variant is a process of its own (benchmarks/throughput_worker.py). As many as fit the GPU's
memory start at once and warm up. Then they train one at a time, `--repeats` times round, so that
every repeat has one turn of each. `sft.py` variants are recipes/sft.py itself, with TensorBoard.
DDP and FSDP2 take every GPU, with as much work for each. Two GPUs are compared with one.

Only tokens that are not padding count. MFU is model FLOPs over the rate of a bf16 matrix product
measured in the same command: 4 FLOPs for each frozen parameter and token, 6 for a trained one, the
head at the tokens in the loss alone. One more turn of the `sft.py` variants is profiled by class of
kernel. Writes throughput.csv, profile.csv and throughput.png.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sftlab.config.launch_command import as_arguments, launch_command
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.measurement.hardware_limit import matrix_rate
from sftlab.models.random_models import make_random_files, random_files
from sftlab.paths import ROOT
from sftlab.runs.environment import provenance
from sftlab.script_options import Options
from sftlab.tables import write_csv

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


class Variant(NamedTuple):
    """A trainer under a launch config.

    `fields` are those of the recipe, of trl's SFTConfig, or of the loop. `longest` is the most
    tokens of a row, `gb` an upper bound of the memory that it reserves on a GPU.
    """

    kind: str
    launch: str
    fields: dict[str, Any]
    longest: int = 512
    shape: str = "llama3.2-1b"
    on_all_gpus: bool = False
    gb: int = 30


def sft(
    launch: str,
    rows: int = 32,
    longest: int = 512,
    gb: int = 20,
    on_all: bool = False,
    **fields: Any,
) -> Variant:
    """Returns a variant of recipes/sft.py, with `rows` rows a step for each process."""
    fields |= {"per_device_train_batch_size": rows, "max_length": longest}
    return Variant("sft", launch, fields, longest, on_all_gpus=on_all, gb=gb)


LLAMA_7B = "llama2-7b"
QLORA_7B = {
    "load_in_4bit": True,
    "optim": "paged_adamw_32bit",
    "gradient_checkpointing": True,
    "max_length": 1024,
    "per_device_train_batch_size": 4,
    "lora": {"r": 32, "lora_alpha": 64, "target_modules": ALL},
}
VARIANTS = {
    "sft.py bf16": sft("single"),
    "sft.py fp8": sft("fp8", gb=14),
    "sft.py bf16, all linears": sft("single", gb=26, lora_target_modules=ALL),
    "sft.py fp8, all linears": sft("fp8", lora_target_modules=ALL),
    "published loop, fp16": Variant("loop", "single", {"autocast": "float16"}, gb=42),
    "trl bf16": Variant("trl", "single", {}),
    "sft.py bf16, 64 rows": sft("single", rows=64, gb=46),
    "sft.py fp8, 64 rows": sft("fp8", rows=64, gb=46),
    "sft.py bf16, all linears, 64 rows": sft("single", rows=64, gb=66, lora_target_modules=ALL),
    "sft.py bf16, 20 rows": sft("single", rows=20, gb=16),
    "sft.py fp32, 20 rows": sft("fp32", rows=20, gb=30),
    "sft.py bf16, dropout 0.05": sft("single", lora_dropout=0.05),
    "sft.py bf16, deterministic": sft("single", deterministic="true"),
    "sft.py bf16, not compiled": sft("single", gb=30, compile_layers="false"),
    "sft.py bf16, loss not fused": sft("single", rows=20, gb=18, fused_loss="false"),
    "published loop, bf16": Variant("loop", "single", {"autocast": "bfloat16"}, gb=42),
    "sft.py bf16, not packed": sft("single", rows=20, gb=36, packing="false"),
    "sft.py bf16, rows to 1024": sft("single", rows=24, longest=1024),
    "sft.py bf16, rows to 4096": sft("single", rows=16, longest=4096),
    "sft.py fp8, rows to 4096": sft("fp8", rows=16, longest=4096, gb=14),
    "trl as it comes": Variant(
        "trl", "single", {"dtype": "float32", "gradient_checkpointing": True}, gb=16
    ),
    "published loop, fp32": Variant("loop", "single", {"autocast": None}, gb=50),
    "trl bf16, compiled": Variant("trl", "single", {"torch_compile": True}, gb=22),
    "trl bf16, packed, sdpa": Variant("trl", "single", {"packing": True}, gb=26),
    "trl bf16, packed, sdpa, Liger": Variant(
        "trl", "single", {"packing": True, "use_liger_kernel": True}, gb=24
    ),
    "sft.py QLoRA, 7B": sft(
        "single", rows=4, longest=1024, gb=24, recipe="llama2-7b/all_r32"
    )._replace(shape=LLAMA_7B),
    "trl QLoRA, 7B": Variant("trl", "single", QLORA_7B, 1024, LLAMA_7B, gb=40),
    "sft.py bf16, DDP": sft("ddp", gb=24, on_all=True),
    "sft.py bf16, FSDP2": sft("fsdp", gb=24, on_all=True),
    "sft.py bf16, DDP, 64 rows": sft("ddp", rows=64, gb=64, on_all=True),
    "sft.py bf16, FSDP2, 64 rows": sft("fsdp", rows=64, gb=64, on_all=True),
    "sft.py fp8, DDP": sft("fp8", gb=20, on_all=True),
}
# pairs with and without fused_lora, for linears, rows a step and dropout
FUSED_LORA = {
    f"sft.py bf16, {linears}, {rows} rows, dropout {dropout}{', LoRA fused' * fused}": sft(
        "single", rows=rows, gb=gb, lora_dropout=dropout, lora_target_modules=targets,
        **({"fused_lora": "true"} if fused else {}),
    )
    for linears, targets, sizes in (
        ("all linears", ALL, {64: 64, 20: 24}),
        ("q, v and o", ["q_proj", "v_proj", "o_proj"], {64: 46}),
    )
    for rows, gb in sizes.items()
    for dropout in (0, 0.05)
    for fused in (False, True)
}  # fmt: skip
VARIANTS |= FUSED_LORA


def main() -> None:
    """Make model and rows, run the variants, and write a row for each."""
    arguments = parse_arguments()
    if arguments.draw:
        return draw(arguments.out)
    arguments.out.mkdir(parents=True, exist_ok=True)
    variants = [VARIANTS[name] for name in arguments.variants]
    for shape, longest in dict.fromkeys((variant.shape, variant.longest) for variant in variants):
        make_random_files(shape, longest)
    rate = matrix_rate(torch.device("cuda"), torch.bfloat16)
    rows, profiles, about = [], [], provenance()
    for group in groups(arguments.variants, arguments.gb):
        with tempfile.TemporaryDirectory() as folder:
            found = drive(group, arguments.repeats, Path(folder))
        for name, reports in found.items():
            profiles += [{"variant": name} | r["kernels"] for r in reports if "kernels" in r]
            rows.append(
                {"variant": name, **summary(name, reports[: arguments.repeats], rate), **about}
            )
        write_table(arguments.out / "throughput.csv", rows)
        write_table(arguments.out / "profile.csv", profiles)
    return draw(arguments.out)


def parse_arguments() -> argparse.Namespace:
    """Returns the command line; on several GPUs the variants that take them all are the default."""
    several = [name for name, variant in VARIANTS.items() if variant.on_all_gpus]
    default = [name for name in VARIANTS if name not in [*several, *FUSED_LORA]]
    count, folder = torch.cuda.device_count(), "throughput"
    if count > 1:
        default = ["sft.py bf16", "sft.py fp8", "sft.py bf16, 64 rows", *several]
        folder = f"throughput_{count}gpus"
    parser = Options(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--variants", nargs="+", choices=VARIANTS, default=default, metavar="NAME")
    which.add_argument(
        "--fused_lora", dest="variants", action="store_const", const=list(FUSED_LORA),
        help="pairs with and without fused LoRA",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, help="timed turns of each variant")
    parser.add_argument(
        "--gb", type=int, default=130, help="memory of a GPU that a group of variants may reserve"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results" / folder)
    parser.add_argument(
        "--draw", action="store_true", help="draw the table of --out, measure nothing"
    )
    return parser.parse_args()


def draw(folder: Path) -> None:
    """Draw a folder's table."""
    command = [sys.executable, "benchmarks/draw.py", str(folder.resolve())]
    subprocess.run(command, cwd=ROOT, check=True)


def groups(names: list[str], gb: int) -> list[list[str]]:
    """Returns the variants in their order, as many to a group as fit the memory."""
    found: list[list[str]] = [[]]
    for name in names:
        if sum(VARIANTS[other].gb for other in [*found[-1], name]) > gb and found[-1]:
            found.append([])
        found[-1].append(name)
    return found


def drive(names: list[str], repeats: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Start a worker for each variant, then let them train in turn, `repeats` times.

    Returns the reports of each variant; fewer, or none, where its worker failed.
    """
    processes, reports = {}, {name: [] for name in names}
    for number, name in enumerate(names):
        (folder / str(number)).mkdir()
        processes[name] = (folder / str(number), start(name, repeats, folder / str(number)))
    for mine, process in processes.values():
        appeared(mine / "ready0", process)
    for turn in range(repeats + 1):
        for name, (mine, process) in processes.items():
            if turn == repeats and VARIANTS[name].kind != "sft":
                continue
            if appeared(mine / f"ready{turn}", process):
                (mine / f"go{turn}").touch()
            if appeared(mine / f"done{turn}", process):
                reports[name].append(json.loads((mine / f"done{turn}").read_text(encoding="utf-8")))
                print(f"{name}: {reports[name][-1]['tokens_per_s']:.0f} tokens/s", flush=True)
            elif turn == len(reports[name]) == 0:
                log = (mine / "log").read_text(encoding="utf-8")
                print(f"{name}: failed\n{log[-6000:]}", flush=True)
    for _, process in processes.values():
        process.terminate()
        process.wait()
    return reports


def start(name: str, repeats: int, folder: Path) -> subprocess.Popen:
    """Start the worker of a variant, on one GPU or on all."""
    variant, processes = VARIANTS[name], gpus(VARIANTS[name])
    fields = dict(variant.fields)
    if variant.kind == "sft":
        fields["global_batch_size"] = fields["per_device_train_batch_size"] * processes
    base, rows = random_files(variant.shape, variant.longest)
    words = as_arguments({"kind": variant.kind, "fields": json.dumps(fields)})
    words += as_arguments({"base": base, "rows": rows, "turns": repeats, "folder": folder})
    flags = ["--num_processes", str(processes)]
    # with a compiler process for every core, a group would have hundreds
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "4"}
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


def appeared(path: Path, process: subprocess.Popen) -> bool:
    """Wait until the file is there or the process has ended. Returns whether it is there."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.02)
    return path.exists()


def summary(name: str, reports: list[dict[str, Any]], rate: float) -> dict[str, Any]:
    """Returns median and range over the repeats, and the peak GB of one GPU.

    The cells of a variant that failed are empty.
    """
    count = gpus(VARIANTS[name])
    tokens = sorted(report["tokens_per_s"] for report in reports)
    return {
        "gpus": count,
        "tokens_per_s": round(statistics.median(tokens)) if tokens else "failed",
        "lowest": round(tokens[0]) if tokens else "",
        "highest": round(tokens[-1]) if tokens else "",
        "rows_per_s": round(statistics.median(r["rows_per_s"] for r in reports), 1)
        if tokens
        else "",
        "share_of_limit": round(
            statistics.median(r["model_flops_per_s"] for r in reports) / rate / count, 3
        )
        if tokens
        else "",
        "peak_gb": max(r["peak_gb"] for r in reports) if tokens else "",
        "loss": reports[-1]["loss"] if tokens else "",
        "matrix_tflops_per_s": round(rate / 1e12, 1),
        "repeats": len(reports),
    }


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
