"""Training curves of the fast path against rows padded one by one: the same start, rows, order and
learning rates.

python benchmarks/loss_curves.py --tokenizer DIR --dataset FILE [--steps 300] [--out results/loss_curves/loss_curves.csv]

Random-initialised Llama-3.2-1B, LoRA r=16 on q, v and o, 32 rows a step: `plain` (padded, not
compiled, trl's loss), `fast` (as sft.py comes) and `fp8`, each a run of recipes/sft.py. Writes the
loss of every step and a plot, and says how far the means of 20 steps are from the plain ones.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from sftlab.models.random_models import save_random_llama
from sftlab.runs.environment import provenance
from sftlab.runs.run_directory import read_run
from sftlab.tables import write_csv

ROOT = Path(__file__).parent.parent
BASE = "data/llama3.2-1b-random"
OFF = {"packing": "false", "compile_layers": "false", "fused_loss": "false"}
CURVES = {"plain": ("single", OFF), "fast": ("single", {}), "fp8": ("fp8", {})}
WINDOW = 20


def main() -> None:
    """Train the curves, write them, compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokenizer", required=True, help="folder of a tokenizer of at most 128,256 tokens"
    )
    parser.add_argument("--dataset", required=True, help="local data file")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "loss_curves" / "loss_curves.csv")
    arguments = parser.parse_args()
    save_random_llama(ROOT / BASE, arguments.tokenizer)
    losses, apart = {}, {}
    for name, (launch, fields) in CURVES.items():
        run = train(name, launch, fields, arguments.dataset, arguments.steps)
        losses[name], measured = [loss for _, loss in run["losses"]], run["measured"]
        apart[name] = float(np.abs(means(losses[name]) / means(losses["plain"]) - 1).max())
        print(
            f"{name}: last loss {losses[name][-1]:.4f}, at most {apart[name]:.3%} from plain; ",
            end="",
        )
        print(
            ", ".join(
                f"{k} {measured[k]}" for k in ("tokens_per_s", "warm_up_s", "time_to_first_step_s")
            ),
            flush=True,
        )
        write(arguments.out, losses)
    draw(arguments.out.with_suffix(".png"), losses, apart)


def train(
    name: str, launch: str, fields: dict[str, str], dataset: str, steps: int
) -> dict[str, Any]:
    """run.json of one run, the loss of every step in it."""
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
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", f"accelerate_configs/{launch}.yaml", "recipes/sft.py"]
    command += [
        "--config",
        "recipes/llama3.2-1b/attn_r16.yaml",
        *(f"--{k}={v}" for k, v in fields.items()),
    ]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return read_run(ROOT / fields["output_dir"])


def means(losses: list[float]) -> np.ndarray:
    """Means of `WINDOW` steps each, [steps // WINDOW]."""
    whole = len(losses) // WINDOW * WINDOW
    return np.array(losses[:whole]).reshape(-1, WINDOW).mean(axis=1)


def write(path: Path, losses: dict[str, list[float]]) -> None:
    """A line a step."""
    rows = [
        {"step": i, **dict(zip(losses, v, strict=True))}
        for i, v in enumerate(zip(*losses.values(), strict=True), 1)
    ]
    write_csv(path, [rows[0] | provenance(), *rows[1:]])


def draw(path: Path, losses: dict[str, list[float]], apart: dict[str, float]) -> None:
    """The curves, and below them how far each is from the plain one."""
    figure, (above, below) = plt.subplots(
        2, 1, sharex=True, figsize=(8, 6), height_ratios=[3, 1], layout="constrained"
    )
    steps = (np.arange(len(means(losses["plain"]))) + 1) * WINDOW
    for (name, values), style in zip(losses.items(), ("-", "--", ":"), strict=False):
        above.plot(steps, means(values), style, label=name)
        off = 100 * (means(values) / means(losses["plain"]) - 1)
        below.plot(steps, off, style, label=f"{name}: {apart[name]:.2%}")
    above.set_ylabel("training loss (nats a token)")
    above.legend()
    below.set_ylabel("from plain (%)")
    below.set_xlabel(f"step (means of {WINDOW})")
    below.legend(title="at most")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
