"""Training throughput of this project, of trl and of the published loop, side by side on one GPU or
several.

python benchmarks/throughput.py [--variants NAME ...] [--out results/throughput/throughput.csv]
CUDA_VISIBLE_DEVICES=0,1 python benchmarks/throughput.py     (throughput_2gpus.csv: DDP and FSDP2 against one GPU)

Random-initialised Llama-3.2-1B or, for QLoRA, Llama-2-7B; rows of words of one token each,
lognormal(5.75, 0.7) tokens cut to 16..512 unless the variant's name says otherwise; LoRA r=16 on q,
v and o; 32 rows a step unless it says so, trl and the published loop 20. Every variant is a process
of its own (benchmarks/throughput_worker.py); as many as fit the GPU's memory are started at once,
warm up, and are then let through a turnstile one at a time, `--repeats` times round, so that every
repeat has one of each. `sft.py` variants are recipes/sft.py itself, TensorBoard on; DDP and FSDP2
take every GPU, with as much work for each. Only tokens that are not padding count. Of the `sft.py`
variants one more turn is profiled, by class of kernel (..._profile.csv). The share of the limit is
model FLOPs (4 for each frozen parameter and token, 6 for a trained one, the head at the tokens in
the loss alone) over the rate of a matrix product measured in the same command.
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

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from sftlab.measurement.hardware_limit import matrix_rate
from sftlab.models.random_models import make_random_files, random_files
from sftlab.runs.environment import provenance
from sftlab.tables import write_csv

ROOT = Path(__file__).parent.parent
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


class Variant(NamedTuple):
    """A trainer under a launch config.

    `fields` are those of the recipe, of trl's SFTConfig, or of the loop.
    """

    kind: str
    launch: str
    fields: dict[str, Any]
    longest: int = 512
    shape: str = "llama3.2-1b"
    on_all_gpus: bool = False
    gb: int = 30  # what it reserves of a GPU's memory, or somewhat more


def sft(
    launch: str,
    rows: int = 32,
    longest: int = 512,
    gb: int = 20,
    on_all: bool = False,
    **fields: Any,
) -> Variant:
    """recipes/sft.py under a launch config, with `rows` a process and step."""
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


def main() -> None:
    """Make model and rows, run the variants, and write a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    several = [name for name, variant in VARIANTS.items() if variant.on_all_gpus]
    default = [name for name in VARIANTS if name not in several]
    count, name = torch.cuda.device_count(), "throughput.csv"
    if count > 1:
        default, name = (
            ["sft.py bf16", "sft.py fp8", "sft.py bf16, 64 rows", *several],
            f"throughput_{count}gpus.csv",
        )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=default, metavar="NAME")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--gb", type=int, default=130, help="memory of a GPU that a group of variants may reserve"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results" / name)
    arguments = parser.parse_args()
    variants = [VARIANTS[name] for name in arguments.variants]
    for shape, longest in dict.fromkeys((variant.shape, variant.longest) for variant in variants):
        make_random_files(shape, longest)
    rate = matrix_rate(torch.device("cuda"), torch.bfloat16)
    lines, profiles, about = [], [], provenance()
    for group in groups(arguments.variants, arguments.gb):
        with tempfile.TemporaryDirectory() as folder:
            for name, reports in drive(group, arguments.repeats, Path(folder)).items():
                profiles += [
                    {"variant": name} | report["kernels"]
                    for report in reports
                    if "kernels" in report
                ]
                lines.append(
                    {"variant": name, **summary(name, reports[: arguments.repeats], rate), **about}
                )
        write_table(arguments.out, lines)
        write_table(arguments.out.with_stem(f"{arguments.out.stem}_profile"), profiles)
        draw(arguments.out.with_suffix(".png"), lines)


def groups(names: list[str], gb: int) -> list[list[str]]:
    """Variants in their order, as many to a group as fit the memory."""
    found: list[list[str]] = [[]]
    for name in names:
        if sum(VARIANTS[other].gb for other in [*found[-1], name]) > gb and found[-1]:
            found.append([])
        found[-1].append(name)
    return found


def drive(names: list[str], repeats: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Start a worker a variant, then let them through in turn, `repeats` times.

    A worker may fail.
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
    """The worker of a variant, on one GPU or on all."""
    variant, processes = VARIANTS[name], gpus(VARIANTS[name])
    fields = dict(variant.fields)
    if variant.kind == "sft":
        fields["global_batch_size"] = fields["per_device_train_batch_size"] * processes
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += [
        "--config_file",
        f"accelerate_configs/{variant.launch}.yaml",
        "--num_processes",
        str(processes),
    ]
    command += [
        "benchmarks/throughput_worker.py",
        "--kind",
        variant.kind,
        "--fields",
        json.dumps(fields),
    ]
    model, rows = random_files(variant.shape, variant.longest)
    command += [
        "--base",
        str(model),
        "--rows",
        str(rows),
        "--turns",
        str(repeats),
        "--folder",
        str(folder),
    ]
    # with a compiler process for every core, a group would have hundreds
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "4"}
    log = (folder / "log").open("w")
    return subprocess.Popen(
        command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment
    )


def gpus(variant: Variant) -> int:
    """How many GPUs a variant takes."""
    return torch.cuda.device_count() if variant.on_all_gpus else 1


def appeared(path: Path, process: subprocess.Popen) -> bool:
    """Wait until the file is there or the process has ended."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.02)
    return path.exists()


def summary(name: str, reports: list[dict[str, Any]], rate: float) -> dict[str, Any]:
    """Median and range over the repeats; empty where a variant failed. Memory is a GPU's."""
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
    """Lines as CSV, milliseconds rounded."""
    write_csv(
        path,
        [
            {k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()}
            for line in lines
        ],
    )


def draw(path: Path, lines: list[dict[str, Any]]) -> None:
    """Bars of real tokens/s, with the range of the repeats and the share of the limit."""
    shown = [line for line in lines if line["repeats"]][::-1]
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.32 * len(shown)), layout="constrained")
    for at, line in enumerate(shown):
        speed = line["tokens_per_s"]
        reach = [[speed - line["lowest"]], [line["highest"] - speed]]
        color = "C0" if line["variant"].startswith("sft.py") else "C7"
        axes.barh(at, speed, xerr=reach, color=color, ecolor="black", capsize=3)
        axes.text(
            line["highest"],
            at,
            f"  {speed:,}  ({line['share_of_limit']:.0%})",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(shown)), [line["variant"] for line in shown])
    axes.set_xlabel("real tokens/s: median and range (share of the measured matrix rate)")
    axes.margins(x=0.2, y=0.01)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
