"""What exact continuation costs: saving a checkpoint in pairs with transformers' own, steps with
and without it.

accelerate launch --config_file accelerate_configs/ddp.yaml benchmarks/checkpoint_cost.py --table OUT.csv \
    --config recipes/llama3.2-1b/attn_r16.yaml [--any_field value]

Steps are timed in blocks, in every other one of which the callbacks work that agree on signals and
note the progress. Then checkpoints of the last step are saved in turn by SFTTrainer and by
recipes/sft.py's trainer. The first pairs warm up and are left out; a row a pair, and one of the
medians.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.single_process  # noqa: F401  (before they see the devices)

import argparse
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
from sftlab.fastpath.selection import choose
from sftlab.training.stop_on_signal import StopOnSignal
from sftlab.config.launch import Launch, check_devices, use_all_cpu_cores
from sftlab.models.loading import load_config, load_tokenizer
from sftlab.tables import write_csv
from sftlab.data.chat_template import set_template
from sftlab.training.trainer import LabTrainer, build_trainer

PAIRS, BLOCK, BLOCKS, WARMUP = 9, 10, 14, 10
OWN = {"max_steps": WARMUP + BLOCK * BLOCKS, "logging_steps": 1000, "disable_tqdm": True}
OWN |= {"eval_strategy": "no", "save_strategy": "no", "save_total_limit": 2}


class Cost(TrainerCallback):
    """Takes the machinery out of a trainer's callbacks, lets it work in every other block of steps,
    and times both.
    """

    def __init__(self, trainer: LabTrainer, stop: StopOnSignal) -> None:
        self.trainer, self.machinery = trainer, (stop, trainer.resume)
        for one in self.machinery:
            trainer.remove_callback(one)
        self.blocks: list[float] = []
        self.saves: list[tuple[float, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set it up."""
        for one in self.machinery:
            one.on_train_begin(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Blocks with the machinery are the even ones."""
        done = state.global_step - WARMUP
        if done >= 0 and done % BLOCK == 0:
            now = self._now()
            if done:
                self.blocks.append((now - self._began) / BLOCK)
            if done == BLOCK * BLOCKS:
                self._save_in_turn()
            self._began = self._now()
        if done // BLOCK % 2 == 0:
            for one in self.machinery:
                one.on_step_end(args, state, control)

    def _save_in_turn(self) -> None:
        trainer = self.trainer
        ways = (trainer._save_checkpoint, lambda *args: SFTTrainer._save_checkpoint(trainer, *args))
        for pair in range(PAIRS):
            took = [0.0, 0.0]
            for way in (0, 1) if pair % 2 else (1, 0):
                if trainer.is_world_process_zero():
                    shutil.rmtree(
                        trainer.resume.folder / f"checkpoint-{trainer.state.global_step}",
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--table", type=Path, required=True)
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
        size = round(trainer.resume.sizes[-1] / 2**20, 2)
        write_csv(
            given.table,
            paired("step", steps, {}) + paired("saving", watch.saves[1:], {"checkpoint_mb": size}),
        )


def paired(
    what: str, pairs: list[tuple[float, float]], more: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row a pair, and one of their medians with the lowest and highest difference."""
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
    digits = [
        row | {k: round(v, 6) for k, v in row.items() if isinstance(v, float)}
        for row in [*rows, median]
    ]
    return digits


if __name__ == "__main__":
    main()
