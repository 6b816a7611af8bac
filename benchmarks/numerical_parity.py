"""Losses and LoRA gradients of one step: the fast path and padded rows, both against float32.

python benchmarks/numerical_parity.py --tokenizer DIR --dataset FILE [--rows 32] \
    [--out results/numerical_parity]

The model is a random-initialised Llama-3.2-1B shape with LoRA r=16 on q, v and o. B is drawn at
random, since with its initial zeros A would have no gradient. The rows are the first of the data
set. `plain` is padded, not compiled, with trl's loss. Each step is a process of its own under its
launch config. A row of the table compares two steps: the nats of every token in the loss, and the
direction of the gradient of every LoRA matrix.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.single_process  # noqa: F401  (before they see the devices)

import argparse
import subprocess
import tempfile
from pathlib import Path

import torch

from sftlab.config.launch_command import as_arguments, launch_command
from sftlab.config.parser import parse_recipe
from sftlab.data.splits import load_splits
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.fastpath.selection import choose
from sftlab.config.launch import Launch
from sftlab.models.loading import load_config, load_tokenizer
from sftlab.runs.environment import provenance
from sftlab.paths import ROOT
from sftlab.models.random_models import save_random_model
from sftlab.script_options import Options
from sftlab.tables import write_csv
from sftlab.data.chat_template import set_template
from sftlab.training.building import build_trainer

BASE = "data/llama3.2-1b-random"
OFF = ["--packing", "false", "--compile_layers", "false", "--fused_loss", "false"]
STEPS = {
    "plain fp32": ("fp32", OFF),
    "fast fp32": ("fp32", []),
    "plain bf16": ("single", OFF),
    "fast bf16": ("single", []),
    "fast fp8": ("fp8", []),
}
PAIRS = [
    ("fast fp32", "plain fp32"),
    ("plain bf16", "plain fp32"),
    ("fast bf16", "plain fp32"),
    ("fast bf16", "plain bf16"),
    ("fast fp8", "plain fp32"),
]


def main() -> None:
    """Take the steps, compare them, write the table; with --step take one."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", help="folder of a tokenizer of at most 128,256 tokens")
    parser.add_argument("--dataset", help="local data file")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "numerical_parity")
    parser.add_argument("--step", type=Path, help=argparse.SUPPRESS)
    arguments, rest = parser.parse_known_args()
    if arguments.step:
        return take_step(rest, arguments.rows, arguments.step)
    if not (arguments.tokenizer and arguments.dataset):
        parser.error("--tokenizer and --dataset are required")
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_random_model(ROOT / BASE, arguments.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        for name, (launch, fields) in STEPS.items():
            start(
                launch,
                [*fields, f"--dataset_name={arguments.dataset}"],
                arguments.rows,
                f"{folder}/{name}",
            )
        taken = {name: torch.load(f"{folder}/{name}") for name in STEPS}
    about = provenance()
    lines = [{"step": a, "against": b, **compare(taken[a], taken[b]), **about} for a, b in PAIRS]
    write_csv(arguments.out / "numerical_parity.csv", lines)
    for line in lines:
        print({k: v for k, v in line.items() if k not in about})


def start(launch: str, argv: list[str], rows: int, out: str) -> None:
    """Take one step in a process of its own."""
    fields = {
        "step": out,
        "rows": rows,
        "config": "recipes/llama3.2-1b/attn_r16.yaml",
        "model_name_or_path": BASE,
        "dataset_fraction": 1,
        "lora_dropout": 0,
        "per_device_train_batch_size": rows,
        "global_batch_size": rows,
        "output_dir": f"{out}-run",
    }
    script = "benchmarks/numerical_parity.py"
    command = launch_command(launch, script, as_arguments(fields) + argv)
    subprocess.run(command, cwd=ROOT, check=True)


def take_step(argv: list[str], rows: int, out: Path) -> None:
    """Save the nats [tokens in the loss] and the gradient of every LoRA matrix, by name."""
    launch = Launch.from_environment()
    recipe = parse_recipe(argv, launch)
    name, revision = recipe.model.model_name_or_path, recipe.model.model_revision
    tokenizer = load_tokenizer(name, revision, recipe.training)
    set_template(tokenizer, recipe.training.chat_template_path)
    fast = choose(recipe, load_config(name, revision, recipe.training), launch)
    trainer = build_trainer(recipe, launch, fast, tokenizer, load_splits(recipe.data))
    model, generator = trainer.model.train(), torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    batch = trainer._prepare_inputs(
        trainer.data_collator(trainer.train_dataset.select(range(rows)).to_list())
    )
    with trainer.accelerator.autocast():
        nats = trainer.token_losses(model, batch)[0]
    nats.mean().backward()
    gradients = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.requires_grad}
    torch.save({"nats": nats.detach().cpu(), "gradients": gradients}, out)


def compare(step: dict, against: dict) -> dict[str, float]:
    """Returns the differences of the nats and the cosines between the gradients."""
    apart = (step["nats"] - against["nats"]).abs()
    cosines = torch.tensor(
        [
            torch.cosine_similarity(
                gradient.flatten().double(), against["gradients"][name].flatten().double(), dim=0
            )
            for name, gradient in step["gradients"].items()
        ]
    )
    return {
        "tokens": len(apart),
        "mean_nats": round(step["nats"].mean().item(), 6),
        "mean_nats_against": round(against["nats"].mean().item(), 6),
        "greatest_difference": f"{apart.max():.2g}",
        "mean_difference": f"{apart.mean():.2g}",
        "matrices": len(cosines),
        "least_cosine": f"{cosines.min():.6f}",
        "median_cosine": f"{cosines.median():.6f}",
    }


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
