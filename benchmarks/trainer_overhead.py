"""What recipes/sft.py's trainer costs over plain SFTTrainer, with the fast path switched off.

accelerate launch --config_file accelerate_configs/cpu.yaml benchmarks/trainer_overhead.py \
    --pairs 15 --config recipes/demo/attn_r16.yaml --max_steps 100 [--any_field value]

Step times are compared in pairs, in changing order. Both trainers live in one process, as separate
processes differ by more than the effect. They train on the same tokens in the same order and log to
TensorBoard. One stopwatch times both, from the beginning of step 6 to the end of the last. Writes
cpu.csv, or the name of the GPU such as h200.csv, into results/trainer_overhead (--out).
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.single_process  # noqa: F401  (before they see the devices)

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from trl import SFTTrainer, get_peft_config

from sftlab.config.parser import parse_recipe
from sftlab.config.recipe import Recipe
from sftlab.data.converter import turn_of
from sftlab.data.splits import load_splits
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.fastpath.selection import FastPath
from sftlab.models.layers import Layers
from sftlab.script_options import Options
from sftlab.training.stop_on_signal import StopOnSignal
from sftlab.config.launch import Launch, check_devices, use_all_cpu_cores
from sftlab.paths import ROOT
from sftlab.models.loading import load_tokenizer, model_init_kwargs
from sftlab.runs.environment import machine_name, provenance
from sftlab.tables import write_csv
from sftlab.data.chat_template import set_template
from sftlab.training.building import build_trainer

WARMUP_STEPS = 5


class Stopwatch(TrainerCallback):
    """Measures the seconds a step after the warm-up."""

    step_time_s = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start."""
        if state.global_step == WARMUP_STEPS:
            self._started = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        if state.global_step == state.max_steps:
            self.step_time_s = (self._now() - self._started) / (state.max_steps - WARMUP_STEPS)

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def build(argv: list[str], launch: Launch, lab: bool) -> tuple[SFTTrainer, Stopwatch]:
    """Returns the project's trainer as recipes/sft.py builds it, or plain SFTTrainer."""
    recipe: Recipe = parse_recipe(argv, launch)
    tokenizer = load_tokenizer(
        recipe.model.model_name_or_path, recipe.model.model_revision, recipe.training
    )
    set_template(tokenizer, recipe.training.chat_template_path)
    args, splits, watch = recipe.training, load_splits(recipe.data), Stopwatch()
    if lab:
        plain = FastPath(False, False, False, None, Layers(0))
        return build_trainer(
            recipe, launch, plain, tokenizer, splits, [watch, StopOnSignal()]
        ), watch
    args.model_init_kwargs = model_init_kwargs(
        recipe.model, args.trust_remote_code, args.model_init_kwargs
    )
    trainer = SFTTrainer(
        model=recipe.model.model_name_or_path,
        args=args,
        train_dataset=splits.train.map(turn_of, remove_columns=splits.train.column_names),
        processing_class=tokenizer,
        peft_config=get_peft_config(recipe.model),
        callbacks=[watch],
    )
    return trainer, watch


def main() -> None:
    """Run the pairs, in changing order, and write a row a pair."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "trainer_overhead")
    arguments, rest = parser.parse_known_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    launch = Launch.from_environment()
    check_devices(launch)
    use_all_cpu_cores(launch)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TENSORBOARD_LOGGING_DIR"] = folder
        argv = [
            *rest,
            "--output_dir",
            folder,
            "--eval_strategy",
            "no",
            "--save_strategy",
            "no",
            "--disable_tqdm=true",
        ]
        trainers = {name: build(argv, launch, name == "sft.py") for name in ("sft.py", "plain")}
        for pair in range(arguments.pairs):
            losses = {}
            for name in trainers if pair % 2 == 0 else reversed(trainers):
                losses[name] = trainers[name][0].train().training_loss
            ours, plain = (trainers[name][1].step_time_s for name in ("sft.py", "plain"))
            rows.append(
                {"pair": pair + 1, "sft_py_step_s": round(ours, 6), "plain_step_s": round(plain, 6)}
            )
            rows[-1] |= {
                "ratio": round(ours / plain, 4),
                "loss_difference": abs(losses["sft.py"] - losses["plain"]),
            }
    about = provenance() | {"arguments": " ".join(sys.argv[1:])}
    write_csv(arguments.out / f"{machine_name()}.csv", [row | about for row in rows])
    ratios = [row["ratio"] for row in rows]
    print(
        f"sft.py over plain SFTTrainer: median {statistics.median(ratios):.4f}, "
        f"{min(ratios)} to {max(ratios)}"
    )


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
