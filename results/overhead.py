"""What recipes/sft.py costs over plain SFTTrainer with the same settings: step times in pairs, run in turn.

python results/overhead.py --config recipes/demo/attn_r16.yaml --config_file accelerate_configs/cpu.yaml \
    [--pairs 5] [--max_steps 100] [--out results/overhead_cpu.csv] [--any_field value]

Both are launched by accelerate, train on the same tokens in the same order and log to TensorBoard. A step's time is the
wall clock from the beginning of step 6 to the end of the last, over the steps between, in both.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import TrainerCallback
from trl import SFTTrainer, get_peft_config

ROOT = Path(__file__).parent.parent
WARMUP_STEPS = 5


class Stopwatch(TrainerCallback):
    """Seconds a step after the warm-up, of the plain trainer."""

    def on_step_begin(self, args, state, control, **kwargs):  # noqa: ANN001, ANN201
        if state.global_step == WARMUP_STEPS:
            self._synchronize()
            self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):  # noqa: ANN001, ANN201
        if state.global_step == state.max_steps:
            self._synchronize()
            self.step_time_s = (time.perf_counter() - self.started) / (state.max_steps - WARMUP_STEPS)

    @staticmethod
    def _synchronize() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def plain(argv: list[str], out: Path) -> None:
    """Plain SFTTrainer, with the recipe read by the project's parser so that the settings are the same."""
    from sftlab.config import parse_recipe
    from sftlab.data import load_splits
    from sftlab.launch import Launch, settle_single_process, use_all_cpu_cores
    from sftlab.model import load_tokenizer, model_init_kwargs
    from sftlab.template import set_template

    launch = Launch.from_environment()
    settle_single_process(launch)
    use_all_cpu_cores(launch)
    recipe = parse_recipe(argv, launch)
    tokenizer = load_tokenizer(recipe.model.model_name_or_path, recipe.model.model_revision, recipe.training)
    set_template(tokenizer, recipe.training.chat_template_path)
    splits = load_splits(recipe.data)
    recipe.training.model_init_kwargs = model_init_kwargs(recipe.model, recipe.training)
    watch = Stopwatch()
    trainer = SFTTrainer(
        recipe.model.model_name_or_path,
        recipe.training,
        train_dataset=splits.train,
        processing_class=tokenizer,
        peft_config=get_peft_config(recipe.model),
        callbacks=[watch],
    )
    result = trainer.train()
    out.write_text(json.dumps({"step_time_s": watch.step_time_s, "train_loss": result.training_loss}))


def one(config_file: str, script: list[str], fields: list[str]) -> None:
    """Launch one of the two and wait; its output is shown only if it fails."""
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", config_file]
    done = subprocess.run([*launcher, *script, *fields], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def write(path: Path, rows: list[dict]) -> None:
    """The table so far."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Run the pairs, in changing order, and write one row a pair and the median."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--config_file", required=True)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "overhead_cpu.csv")
    arguments, rest = parser.parse_known_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for pair in range(arguments.pairs):
            fields = ["--config", arguments.config, *rest, "--max_steps", str(arguments.max_steps)]
            fields += ["--eval_strategy", "no", "--save_strategy", "no", "--overwrite"]
            mine = ["recipes/sft.py"], [*fields, "--output_dir", str(folder / "run")]
            theirs = (
                ["results/overhead.py", "plain", str(folder / "p.json")],
                [*fields, "--output_dir", str(folder / "p")],
            )
            for script, own in (mine, theirs) if pair % 2 == 0 else (theirs, mine):
                one(arguments.config_file, script, own)
            run = json.loads((folder / "run" / "run.json").read_text())
            other = json.loads((folder / "p.json").read_text())
            ours = run["measured"]["step_time_s"]
            rows.append(
                {
                    "pair": pair + 1,
                    "sft_py_step_s": ours,
                    "plain_sfttrainer_step_s": round(other["step_time_s"], 5),
                    "ratio": round(ours / other["step_time_s"], 4),
                    "same_train_loss": abs(run["measured"]["train_loss"] - other["train_loss"]) < 1e-3,
                    "hardware": run["hardware"].get("gpu") or f"{run['hardware']['cpu_cores']} CPU cores",
                    "versions": " ".join(f"{k} {v}" for k, v in run["versions"].items()),
                    "command": f"python results/overhead.py {' '.join(sys.argv[1:])}",
                }
            )
            print(rows[-1]["ratio"], flush=True)
            write(arguments.out, rows)
    ratios = [row["ratio"] for row in rows]
    print(f"sft.py over plain SFTTrainer: median {statistics.median(ratios)}, {min(ratios)} to {max(ratios)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["plain"]:
        os.environ["TENSORBOARD_LOGGING_DIR"] = tempfile.mkdtemp()
        plain(sys.argv[3:], Path(sys.argv[2]))
    else:
        main()
