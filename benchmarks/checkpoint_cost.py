"""What exact continuation costs: saving a checkpoint, and steps, with and without its parts.

accelerate launch --config_file accelerate_configs/ddp.yaml benchmarks/checkpoint_cost.py \
    --config recipes/llama3.2-1b/attn_r16.yaml [--any_field value] [--out results/checkpoint_cost]

Steps are timed in blocks. In every other block the callbacks work that agree on signals and note
the progress. Then SFTTrainer and recipes/sft.py's trainer save a checkpoint of the last step in
turn. The first pairs warm up and are left out. Writes a row a pair, and one of the medians.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.single_process  # noqa: F401  (before they see the devices)

import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from trl import SFTTrainer

from sftlab.config.parser import parse_recipe
from sftlab.data.splits import load_splits
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.fastpath.selection import choose
from sftlab.script_options import Options
from sftlab.training.stop_on_signal import StopOnSignal
from sftlab.config.launch import Launch, check_devices, use_all_cpu_cores
from sftlab.paths import ROOT
from sftlab.models.loading import load_config, load_tokenizer
from sftlab.tables import write_csv
from sftlab.data.chat_template import set_template
from sftlab.training.building import build_trainer
from sftlab.training.trainer import LabTrainer

PAIRS, BLOCK, BLOCKS, WARMUP = 9, 10, 14, 10
OWN = {"max_steps": WARMUP + BLOCK * BLOCKS, "logging_steps": 1000, "disable_tqdm": True}
OWN |= {"eval_strategy": "no", "save_strategy": "no", "save_total_limit": 2}


class Cost(TrainerCallback):
    """Times steps with and without the callbacks of exact continuation, then two ways of saving.

    The callbacks work in every other block of steps.
    """

    def __init__(self, trainer: LabTrainer, stop: StopOnSignal) -> None:
        self.trainer, self.parts = trainer, (stop, trainer.checkpointer, trainer.clock)
        for one in self.parts:
            trainer.remove_callback(one)
        self.blocks: list[float] = []
        self.saves: list[tuple[float, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the callbacks."""
        for one in self.parts:
            one.on_train_begin(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Time the block, and let the callbacks work in the even ones."""
        done = state.global_step - WARMUP
        if done >= 0 and done % BLOCK == 0:
            now = self._now()
            if done:
                self.blocks.append((now - self._began) / BLOCK)
            if done == BLOCK * BLOCKS:
                self._save_in_turn()
            self._began = self._now()
        if done // BLOCK % 2 == 0:
            for one in self.parts:
                one.on_step_end(args, state, control)

    def _save_in_turn(self) -> None:
        trainer = self.trainer
        ways = (trainer._save_checkpoint, lambda *args: SFTTrainer._save_checkpoint(trainer, *args))
        for pair in range(PAIRS):
            took = [0.0, 0.0]
            for way in (0, 1) if pair % 2 else (1, 0):
                if trainer.is_world_process_zero():
                    shutil.rmtree(
                        trainer.checkpointer.folder / f"checkpoint-{trainer.state.global_step}",
                        ignore_errors=True,
                    )
                began = self._now()
                ways[way](trainer.model_wrapped, None)
                took[way] = self._now() - began
            self.saves.append((took[0], took[1]))

    def _now(self) -> float:
        self.trainer.accelerator.wait_for_everyone()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    """Train with the stopwatch, and write."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "checkpoint_cost")
    given, rest = parser.parse_known_args()
    launch = Launch.from_environment()
    check_devices(launch)
    use_all_cpu_cores(launch)
    recipe = parse_recipe([*rest, *(f"--{name}={value}" for name, value in OWN.items())], launch)
    name, revision, args = (
        recipe.model.model_name_or_path,
        recipe.model.model_revision,
        recipe.training,
    )
    tokenizer, config = load_tokenizer(name, revision, args), load_config(name, revision, args)
    set_template(tokenizer, args.chat_template_path)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(args.output_dir) / "tensorboard")
    stop, fast = StopOnSignal(), choose(recipe, config, launch)
    trainer = build_trainer(recipe, launch, fast, tokenizer, load_splits(recipe.data), [stop])
    watch = Cost(trainer, stop)
    trainer.add_callback(watch)
    trainer.train()
    if trainer.is_world_process_zero():
        steps = list(zip(watch.blocks[2::2], watch.blocks[3::2], strict=True))
        size = round(trainer.checkpointer.room.sizes[-1] / 2**20, 2)
        given.out.mkdir(parents=True, exist_ok=True)
        write_csv(
            given.out / "checkpoint_cost.csv",
            paired("step", steps, {}) + paired("saving", watch.saves[1:], {"checkpoint_mb": size}),
        )


def paired(
    what: str, pairs: list[tuple[float, float]], more: dict[str, Any]
) -> list[dict[str, Any]]:
    """Returns a row a pair, and one of the medians with the lowest and highest difference."""
    rows = [
        {"what": what, "result": f"pair {n}", "ours_s": a, "stock_s": b}
        for n, (a, b) in enumerate(pairs, 1)
    ]
    apart = [a - b for a, b in pairs]
    ours, stock = (statistics.median(side) for side in zip(*pairs, strict=True))
    median = {
        "what": what,
        "result": "median of the pairs",
        "ours_s": ours,
        "stock_s": stock,
    } | more
    median |= {
        "difference_s": statistics.median(apart),
        "lowest_s": min(apart),
        "highest_s": max(apart),
    }
    return [
        row | {k: round(v, 6) for k, v in row.items() if isinstance(v, float)}
        for row in [*rows, median]
    ]


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
