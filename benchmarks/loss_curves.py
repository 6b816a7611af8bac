"""Training curves of the fast path and of padded rows, with the same rows, order and learning rate.

python benchmarks/loss_curves.py --tokenizer DIR --dataset FILE [--steps 300] \
    [--out results/loss_curves]

The model is a random-initialised Llama-3.2-1B shape with LoRA r=16 on q, v and o, 32 rows a step.
Each curve is a run of recipes/sft.py: `plain` is padded, not compiled, with trl's loss; `fast` has
the default settings; `fp8` is `fast` under fp8.yaml. Writes the loss of every step and a plot, and
prints how far the means of 20 steps are from those of `plain`.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from sftlab.config.launch_command import as_arguments, launch_command
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.models.random_models import save_random_model
from sftlab.paths import ROOT
from sftlab.runs.environment import provenance
from sftlab.runs.run_directory import read_run
from sftlab.script_options import Options
from sftlab.tables import write_csv

BASE = "data/llama3.2-1b-random"
OFF = {"packing": "false", "compile_layers": "false", "fused_loss": "false"}
CURVES = {"plain": ("single", OFF), "fast": ("single", {}), "fp8": ("fp8", {})}
WINDOW = 20


def main() -> None:
    """Train the curves, write them, compare them."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokenizer", required=True, help="folder of a tokenizer of at most 128,256 tokens"
    )
    parser.add_argument("--dataset", required=True, help="local data file")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "loss_curves")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_random_model(ROOT / BASE, arguments.tokenizer)
    losses = {}
    for name, (launch, fields) in CURVES.items():
        run = train(name, launch, fields, arguments.dataset, arguments.steps)
        losses[name], measured = [loss for _, loss in run["losses"]], run["measured"]
        apart = np.abs(means(losses[name]) / means(losses["plain"]) - 1).max()
        speed = {k: measured[k] for k in ("tokens_per_s", "warm_up_s", "time_to_first_step_s")}
        print(f"{name}: last loss {losses[name][-1]:.4f}, at most {apart:.3%} from plain; {speed}")
        write(arguments.out / "loss_curves.csv", losses)
    drawing = [sys.executable, "benchmarks/draw.py", str(arguments.out.resolve())]
    subprocess.run(drawing, cwd=ROOT, check=True)


def train(
    name: str, launch: str, fields: dict[str, str], dataset: str, steps: int
) -> dict[str, Any]:
    """Train one run. Returns its run.json, which has the loss of every step."""
    fields = {
        "model_name_or_path": BASE,
        "dataset_name": dataset,
        "dataset_fraction": "1",
        "output_dir": f"runs/curve-{name}",
        "max_steps": str(steps),
        "logging_steps": "1",
        "global_batch_size": "32",
        "per_device_train_batch_size": "32",
        "eval_strategy": "no",
        "save_strategy": "no",
        "lora_dropout": "0",
        "overwrite": "true",
        **fields,
    }
    recipe = ["--config", "recipes/llama3.2-1b/attn_r16.yaml"]
    command = launch_command(launch, "recipes/sft.py", recipe + as_arguments(fields))
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return read_run(ROOT / fields["output_dir"])


def means(losses: list[float]) -> np.ndarray:
    """Returns means of `WINDOW` steps each, [steps // WINDOW]."""
    whole = len(losses) // WINDOW * WINDOW
    return np.array(losses[:whole]).reshape(-1, WINDOW).mean(axis=1)


def write(path: Path, losses: dict[str, list[float]]) -> None:
    """Write a row a step, and hardware and versions beside the first."""
    rows = [
        {"step": i, **dict(zip(losses, v, strict=True))}
        for i, v in enumerate(zip(*losses.values(), strict=True), 1)
    ]
    write_csv(path, [rows[0] | provenance(), *rows[1:]])


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
