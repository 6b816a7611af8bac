"""Trains one variant of benchmarks/preference_step.py, which starts it, in a process of its own.

accelerate launch --config_file accelerate_configs/cpu.yaml benchmarks/preference_step_worker.py \
    --fields '{}' --base DIR --pairs FILE --count 64 --batch 8 --max_length 640 --turns 3 \
    --folder DIR [--trl]

A turn is two epochs over the same pairs: the first warms up, the second is timed. It waits for the
file `goN` before turn N, and writes `doneN` (JSON) after it; `readyN` says that it waits. `facts`
has the work of an epoch. On a CPU the turn after the last measures the memory of one step. An error
is written to `failed` in one line.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.single_process  # noqa: F401  (before they see the devices)

import argparse
import gc
import json
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from sftlab.config.launch import Launch, check_devices, use_all_cpu_cores
from sftlab.config.launch_command import as_arguments
from sftlab.config.parser import parse_recipe
from sftlab.config.recipe import Recipe
from sftlab.data.chat_template import set_template
from sftlab.data.encoded_pairs import IDS, PROMPT, encode_pairs
from sftlab.data.splits import load_splits
from sftlab.fastpath import selection
from sftlab.fastpath.kernel_warmup import start_compilers
from sftlab.measurement.hardware_limit import synchronize
from sftlab.measurement.memory import peak_beyond
from sftlab.measurement.turn_workers import wait_for_turn_file
from sftlab.models.loading import load_config, load_tokenizer
from sftlab.script_options import Options
from sftlab.training.building import build_trainer
from sftlab.training.preference_trainer import PreferenceTrainer
from sftlab.training.reference_pass import with_reference

TARGETS = ["q_proj", "v_proj", "o_proj"]
ON_CPU = not torch.cuda.is_available()
GB = 2**30


class Turns(TrainerCallback):
    """Lets a turn of two epochs train when its file appears, and times the second epoch."""

    def __init__(self, folder: Path, epoch: int) -> None:
        self._folder, self._epoch, self._loss = folder, epoch, None

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        """Keep the training loss."""
        self._loss = logs.get("loss", self._loss)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait before a turn's first step, and start the clock in the middle of the turn."""
        turn, step = divmod(state.global_step, 2 * self._epoch)
        if step == 0 and turn:
            wait_for(self._folder, turn)
        if step == self._epoch:
            synchronize()
            if not ON_CPU:
                torch.cuda.reset_peak_memory_stats()
                self._held = torch.cuda.memory_allocated()
            self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report after a turn's last step, and give memory back that the process does not use."""
        turn, step = divmod(state.global_step, 2 * self._epoch)
        if step:
            return
        synchronize()
        report = {"seconds": time.perf_counter() - self._started, "loss": self._loss}
        if not ON_CPU:
            peak = torch.cuda.max_memory_allocated()
            report |= {"peak_gb": peak / GB, "step_gb": (peak - self._held) / GB}
        gc.collect()
        torch.cuda.empty_cache()
        write(self._folder, f"done{turn - 1}", report)


def wait_for(folder: Path, turn: int) -> None:
    """Say that the process waits for a turn, and wait."""
    (folder / f"ready{turn}").touch()
    wait_for_turn_file(folder / f"go{turn}")


def write(folder: Path, name: str, report: dict[str, Any]) -> None:
    """Write a report, whole when it appears."""
    (folder / "report").write_text(json.dumps(report), encoding="utf-8")
    (folder / "report").rename(folder / name)


def main(argv: list[str] | None = None) -> None:
    """Train one variant; it ends after the turn that follows its last."""
    options = parse_options(argv)
    try:
        measure(options)
    except torch.OutOfMemoryError:
        write(options.folder, "failed", {"why": "out of memory"})
    except Exception as error:  # whatever it is, the other variants go on
        traceback.print_exc()
        write(options.folder, "failed", {"why": f"{type(error).__name__}: {error}"[:200]})


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Returns the command line."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--fields", type=json.loads, required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--pairs", required=True)
    for name in ("count", "batch", "max_length", "turns"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--trl", action="store_true", help="trl's own DPOTrainer")
    return parser.parse_args(argv)


def measure(options: argparse.Namespace) -> None:
    """Build the trainer and train its turns."""
    launch = Launch.from_environment()
    check_devices(launch)
    use_all_cpu_cores(launch)
    recipe = recipe_of(options, launch)
    tokenizer = load_tokenizer(options.base, None, recipe.training)
    set_template(tokenizer, recipe.training.chat_template_path)
    splits = load_splits(recipe.data)
    splits = splits._replace(train=splits.train.select(range(options.count)))
    encoded = encode_pairs(splits, tokenizer, recipe.training)["train"].rows
    if len(encoded) < options.count:
        raise ValueError(f"{len(encoded)} of {options.count} pairs are left within max_length")
    turns = Turns(options.folder, steps_of(options))
    if options.trl:
        trainer = trls_trainer(options, encoded, tokenizer, turns)
    else:
        config = load_config(options.base, None, recipe.training)
        fast = selection.choose(recipe, config, launch)
        compilers = start_compilers(recipe, config, fast)
        trainer = build_trainer(recipe, launch, fast, tokenizer, splits, [turns])
        print("kernels:", compilers.exception() or "compiled", fast.reasons, flush=True)
    wait_for(options.folder, 0)
    write(options.folder, "facts", facts(trainer, encoded))
    trainer.train()
    if ON_CPU:
        wait_for(options.folder, options.turns)
        report = {"step_gb": memory_of_a_step(trainer, encoded, options.trl)}
        write(options.folder, f"done{options.turns}", report)


def steps_of(options: argparse.Namespace) -> int:
    """Returns the steps of an epoch."""
    return options.count // options.batch


def recipe_of(options: argparse.Namespace, launch: Launch) -> Recipe:
    """Returns the recipe of a preference training of `turns` turns. Fields of trl are left out."""
    epochs = 2 * options.turns
    fields = {
        "method": "dpo",
        "model_name_or_path": options.base,
        "dataset_name": options.pairs,
        "output_dir": options.folder / "run",
        "dtype": "float32" if ON_CPU else "bfloat16",
        "use_peft": "true",
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": options.batch,
        "global_batch_size": options.batch,
        "max_length": options.max_length,
        "learning_rate": 1e-5,
        "gradient_checkpointing": "false",
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": "true",
        "logging_steps": steps_of(options),
        **({} if options.trl else options.fields),
    }
    words = [*as_arguments(fields), "--lora_target_modules", *TARGETS]
    return parse_recipe([*words, "--split_fractions", "0.99", "0", "0.01"], launch)


def trls_trainer(
    options: argparse.Namespace, encoded: Dataset, tokenizer: Any, turns: Turns
) -> DPOTrainer:
    """Returns trl's own trainer over the same tokens, with this variant's fields of DPOConfig."""

    class OverTheSameTokens(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
            return dataset

    fields = dict(options.fields)
    loading = {"dtype": torch.float32 if ON_CPU else torch.bfloat16}
    loading["attn_implementation"] = fields.pop("attn_implementation", "sdpa")
    args = DPOConfig(
        output_dir=str(options.folder / "run"),
        num_train_epochs=2 * options.turns,
        per_device_train_batch_size=options.batch,
        max_length=options.max_length,
        learning_rate=1e-5,
        bf16=not ON_CPU,
        use_cpu=ON_CPU,
        gradient_checkpointing=False,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=steps_of(options),
        **fields,
    )
    return OverTheSameTokens(
        model=AutoModelForCausalLM.from_pretrained(options.base, **loading),
        args=args,
        train_dataset=encoded.map(_as_trl, remove_columns=encoded.column_names),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"
        ),
        callbacks=[turns],
    )


def _as_trl(pair: dict[str, Any]) -> dict[str, list[int]]:
    sides = {name: pair[name][pair[PROMPT] :] for name in IDS}
    return {"prompt_ids": pair[IDS[0]][: pair[PROMPT]]} | sides


def facts(trainer: Trainer, encoded: Dataset) -> dict[str, Any]:
    """Returns the tokens of an epoch and what really runs.

    `reference_s` are the seconds in which the reference of all pairs is computed once.
    """
    fast, found = getattr(trainer, "fast", None), {}
    if getattr(trainer, "reference_once", trainer.args.precompute_ref_log_probs):
        found["reference_s"] = seconds_of_the_reference(trainer)
    parts = ("packing", "fused_loss", "compile_layers")
    found["parts"] = " ".join(name for name in parts if fast and getattr(fast, name))
    return found | {"tokens": sum(len(ids) for name in IDS for ids in encoded[name])}


def memory_of_a_step(trainer: Trainer, encoded: Dataset, trl: bool) -> float:
    """Returns the GB that a step over the first pairs holds beyond what is held before it."""
    rows = [encoded[n] for n in range(trainer.args.per_device_train_batch_size)]
    rows = [_as_trl(one) for one in rows] if trl else rows
    if trainer.precompute_ref_logps:
        rows = [one | {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0} for one in rows]
    inputs, model = trainer.data_collator(rows), trainer.model.train()
    return peak_beyond(lambda: trainer.training_step(model, inputs)) / GB


def seconds_of_the_reference(trainer: DPOTrainer) -> float:
    """Returns the seconds in which the log-probabilities of the reference are computed."""
    own, pairs = isinstance(trainer, PreferenceTrainer), trainer.train_dataset
    at_once = trainer.args.per_device_train_batch_size
    batches = [] if own else [*trainer.get_train_dataloader()]
    for timed in (False, True):
        synchronize()
        started = time.perf_counter()
        if own:
            with_reference(trainer, pairs if timed else pairs.select(range(at_once)), at_once)
        for batch in batches if timed else batches[:1]:
            trainer.compute_ref_log_probs(trainer.model, trainer._prepare_inputs(batch))
        synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
