"""Every launch config on real GPUs: what really ran, whether losses agree, and adapters that load.

python benchmarks/launch_matrix.py --tokenizer DIR --dataset FILE [--only NAME ...] \
    [--out results/launch_matrix]

A random-initialised model of Llama-3.2-1B's shape is saved once. `accelerate launch recipes/sft.py`
trains it for 30 steps a cell, with one global batch and data order. Cells of two processes need two
GPUs. Where there are two, two cells of one process run at a time. A cell that succeeded before is
not run again.
"""

import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from sftlab.config.launch_command import LAUNCHER, launch_command
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.models.random_models import save_random_model
from sftlab.paths import ROOT
from sftlab.runs.run_directory import read_run
from sftlab.script_options import Options
from sftlab.tables import write_csv

QLORA = {
    "load_in_4bit": "true",
    "use_bnb_nested_quant": "true",
    "bnb_4bit_quant_storage": "bfloat16",
    "dtype": "bfloat16",
    "optim": "paged_adamw_32bit",
    "gradient_checkpointing": "true",
}
STEPS = 30
COMPARED = 20
ADAPTER_CHECKED = ("ddp", "fsdp", "fsdp_qlora")


class Cell(NamedTuple):
    """A launch config, the processes that must run, accelerate's flags and recipe overrides."""

    config: str
    processes: int = 1
    flags: tuple[str, ...] = ()
    overrides: dict[str, str] = {}


CELLS = {
    "fp32": Cell("fp32"),
    "fp16": Cell("fp16"),
    "bf16": Cell("single"),
    "single": Cell("single"),
    "fp8": Cell("fp8"),
    "qlora_single": Cell("single", overrides=QLORA),
    "cpu_on_gpu_machine": Cell(
        "cpu",
        overrides={
            "model_init_kwargs": '{"num_hidden_layers": 1}',
            "max_steps": "2",
            "max_length": "64",
        },
    ),
    "ddp": Cell("ddp", 2),
    "fsdp": Cell("fsdp", 2),
    "bf16_two_processes": Cell("single", 2, ("--num_processes", "2")),
    "ddp_fp16": Cell("ddp", 2, ("--mixed_precision", "fp16")),
    "ddp_qlora": Cell("ddp", 2, overrides=QLORA),
    "fsdp_qlora": Cell("fsdp", 2, overrides={**QLORA, "optim": "adamw_torch_fused"}),
    "fsdp_fp16": Cell("fsdp", 2, ("--mixed_precision", "fp16")),
    "more_processes_than_gpus": Cell("ddp", 2, ("--num_processes", "99")),
}


def main() -> None:
    """Make the base model, run the cells, compare them, write the table."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokenizer", required=True, help="folder of a tokenizer of at most 128,256 tokens"
    )
    parser.add_argument("--dataset", required=True, help="local data file")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "launch_matrix")
    parser.add_argument("--only", nargs="*", default=list(CELLS))
    arguments = parser.parse_args()
    base = ROOT / "data" / "llama3.2-1b-random"
    save_random_model(base, arguments.tokenizer)
    gpus: Queue[str] = Queue()
    for index in range(torch.cuda.device_count()):
        gpus.put(str(index))
    names = [n for n in arguments.only if CELLS[n].processes <= torch.cuda.device_count()]
    single = [n for n in names if CELLS[n].processes == 1]
    with ThreadPoolExecutor(torch.cuda.device_count()) as pool:
        runs = dict(
            zip(
                single,
                pool.map(lambda n: run_cell(n, base, arguments.dataset, gpus), single),
                strict=True,
            )
        )
    for name in names:
        if name not in runs:
            runs[name] = run_cell(name, base, arguments.dataset, None)
    rows = [row(name, command, run, runs) for name, (command, run) in runs.items()]
    for line in rows:
        adapter = ROOT / "runs" / f"matrix-{line['cell']}" / "adapter"
        if line["cell"] in ADAPTER_CHECKED and adapter.is_dir():
            line["adapter_changes_a_logit_by"] = round(adapter_effect(base, adapter), 3)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.out / "launch_matrix.csv", rows)


def run_cell(
    name: str, base: Path, dataset: str, gpus: "Queue[str] | None"
) -> tuple[str, dict[str, Any]]:
    """Launch one cell, on a GPU of the queue where it has one process.

    Returns its command and its run.json.
    """
    cell = CELLS[name]
    folder = ROOT / "runs" / f"matrix-{name}"
    fields = {
        "model_name_or_path": str(base),
        "dataset_name": dataset,
        "dataset_fraction": "1",
        "output_dir": str(folder),
        "lora_dropout": "0",
        "global_batch_size": "32",
        "max_steps": str(STEPS),
        "logging_steps": "1",
        "warmup_steps": "3",
        "eval_strategy": "no",
        "save_strategy": "no",
        "overwrite": "true",
        **cell.overrides,
    }
    recipe = ["--config", "recipes/llama3.2-1b/attn_r16.yaml"]
    given = [word for key, value in fields.items() for word in (f"--{key}", value)]
    command = launch_command(cell.config, "recipes/sft.py", recipe + given, cell.flags)
    typed = " ".join(["accelerate", *command[len(LAUNCHER) - 1 :]])
    shown = typed.replace(str(base), "BASE").replace(dataset, "ROWS").replace(f"{ROOT}/", "")
    if (folder / "run.json").is_file() and read_run(folder)["status"] == "succeeded":
        return shown, read_run(folder)
    environment = dict(os.environ)
    gpu = gpus.get() if gpus else None
    if gpu is not None and cell.config != "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    started = time.time()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if gpus:
        gpus.put(gpu)
    if (folder / "run.json").is_file():
        run = read_run(folder)
    else:
        refusal = next(
            (line for line in done.stderr.splitlines() if line.startswith("error: ")), None
        )
        run = {"status": "refused" if refusal else "failed", "reason": refusal}
    took = time.time() - started
    print(
        f"{name}: {run['status']} ({run.get('reason')}), exit {done.returncode}, {took:.0f} s",
        flush=True,
    )
    if run["status"] == "failed":
        print(done.stdout[-1500:], done.stderr[-3000:], flush=True)
    return shown, run


def row(
    name: str, command: str, run: dict[str, Any], runs: dict[str, tuple[str, dict[str, Any]]]
) -> dict[str, Any]:
    """Returns one row of the table.

    The loss columns compare with the one-GPU bf16 run at the same global batch.
    """
    ran, measured, versions = run.get("ran", {}), run.get("measured", {}), run.get("versions", {})
    asked = run.get("launch", {})
    memory = [r.get("allocated_gb", r.get("resident_gb")) for r in measured.get("peak_memory", [])]
    losses = dict(map(tuple, run.get("losses", [])))
    reference = dict(map(tuple, runs.get("bf16", ("", {}))[1].get("losses", [])))
    steps = [s for s in range(1, COMPARED + 1) if s in losses and s in reference]
    apart = max((abs(losses[s] - reference[s]) for s in steps), default=None)
    return {
        "cell": name,
        "status": run["status"],
        "reason": run.get("reason"),
        "asked": f"{asked.get('precision')} {asked.get('strategy')}",
        "ran": f"{ran.get('precision')} {ran.get('strategy')}",
        "processes": ran.get("world_size"),
        "linear": ran.get("compute", {}).get("linear"),
        "computed_in": ran.get("compute", {}).get("output_dtype"),
        "frozen": " ".join(ran.get("frozen_dtypes", [])),
        "trainable": " ".join(ran.get("trainable_dtypes", [])),
        "quantization": ran.get("quantization"),
        "micro_batch x accumulation": f"{ran.get('micro_batch')} x {ran.get('accumulation')}",
        "tokens_per_s": measured.get("tokens_per_s"),
        "share_of_limit": measured.get("share_of_limit"),
        "peak_allocated_gb": " ".join(map(str, memory)),
        "time_to_first_step_s": measured.get("time_to_first_step_s"),
        "loss_1": losses.get(1),
        "loss_20": losses.get(COMPARED),
        "largest_loss_difference_to_bf16_20_steps": apart if len(steps) == COMPARED else None,
        "validation_loss": measured.get("validation_loss"),
        "gradients_reduced_in": ran.get("gradients_reduced_in"),
        "adapter_changes_a_logit_by": None,
        "hardware": run.get("hardware", {}).get("gpu"),
        "versions": " ".join(f"{k} {v}" for k, v in versions.items()),
        "command": command,
    }


@torch.no_grad()
def adapter_effect(base: Path, adapter: Path) -> float:
    """Returns the largest difference that the saved adapter makes to a logit of one prompt."""
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = LlamaForCausalLM.from_pretrained(base, dtype="float32", device_map="cuda")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name a colour."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"].to("cuda")
    before = model(ids).logits
    after = PeftModel.from_pretrained(model, adapter)(ids).logits
    return float((after - before).abs().max())


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
