"""Fine-tune a causal language model with LoRA on trl's SFTTrainer; writes a run directory.

accelerate launch --config_file accelerate_configs/cpu.yaml recipes/sft.py --config recipes/demo/attn_r16.yaml
accelerate launch --config_file accelerate_configs/ddp.yaml recipes/sft.py \
    --config recipes/llama3.2-1b/attn_r16.yaml [--any_field value]

Fields are those of trl's ModelConfig and SFTConfig and of sftlab/config.py; the command line beats the YAML. Start the
same command again after an interruption, and it continues. A finished run is replaced only with --overwrite.
"""

import sftlab.quiet  # noqa: I001  (before the libraries that it quiets)
import sftlab.settle  # noqa: F401  (before they see the devices)

import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from sftlab.config import Recipe, parse_recipe
from sftlab.data import Splits, load_splits
from sftlab.fastpath import FastPath, choose, start_compilers
from sftlab.forecast import planned_memory
from sftlab.interrupt import StopOnSignal
from sftlab.launch import COMPUTE_DTYPE, PRECISIONS, Launch, check_devices, use_all_cpu_cores
from sftlab.measure import peak_memory, share_of_limit
from sftlab.model import check_target_modules, load_config, load_tokenizer
from sftlab.ran import length_facts, what_ran
from sftlab.run import Run
from sftlab.template import set_template, template_hash
from sftlab.tokens import refuse_other_encoding
from sftlab.trainer import LabTrainer, build_trainer


def main(argv: list[str]) -> None:
    """Check everything, then load, train, save and measure."""
    launch = Launch.from_environment()
    rank = int(os.environ.get("RANK", 0))
    run = None
    try:
        check_devices(launch)
        use_all_cpu_cores(launch)
        recipe = parse_recipe(argv, launch)
        run, checkpoint = begin(recipe, launch, rank)
        tokenizer, template, fast = prepare(recipe, launch)
        with recipe.training.main_process_first(desc="reading the data set"):
            splits = load_splits(recipe.data, recipe.training.dataset_num_proc)
        if splits.tokens:
            refuse_other_encoding(splits.tokens, tokenizer, recipe.training)
    except ValueError as error:
        if run:
            run.fail(f"{error}", rank)
        sys.exit(f"error: {error}" if rank == 0 else 2)
    try:
        run.update(data=splits.facts, template={"source": template, "hash": template_hash(tokenizer)})
        train(recipe, launch, run, checkpoint, tokenizer, splits, fast)
    except KeyboardInterrupt:
        run.finish("interrupted", reason="stopped before the first step or at once")
        raise
    except BaseException as error:
        if not isinstance(error, SystemExit):
            run.fail(f"{type(error).__name__}: {error}", rank)
        raise


def begin(recipe: Recipe, launch: Launch, rank: int) -> tuple[Run, str | None]:
    """Open the run directory on rank 0; every rank learns which checkpoint to continue from."""
    run = Run(recipe.training.output_dir, is_main=rank == 0)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder / "tensorboard")
    found = [run.start(recipe.facts(), launch.facts(), recipe.data.overwrite) if rank == 0 else None]
    if launch.world_size > 1:
        broadcast_object_list(found)
    return run, found[0]


def prepare(recipe: Recipe, launch: Launch) -> tuple[PreTrainedTokenizerBase, str, FastPath]:
    """Tokenizer with its template, and the fast path, after checking what the recipe targets. No weights yet."""
    name, revision = recipe.model.model_name_or_path, recipe.model.model_revision
    tokenizer = load_tokenizer(name, revision, recipe.training)
    config = load_config(name, revision, recipe.training)
    if recipe.model.use_peft:
        check_target_modules(config, recipe.model.lora_target_modules, recipe.training.trust_remote_code)
    template = set_template(tokenizer, recipe.training.chat_template_path)
    fast = choose(recipe, config, launch)
    if fast.compile_layers:
        start_compilers()
    return tokenizer, template, fast


def train(
    recipe: Recipe,
    launch: Launch,
    run: Run,
    checkpoint: str | None,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    fast: FastPath,
) -> None:
    """Train, save the adapter, measure, and write the run's end."""
    args, stop = recipe.training, StopOnSignal()
    trainer = build_trainer(recipe, launch, fast, tokenizer, splits, callbacks=[stop])
    if run.is_main:
        for part, why in fast.reasons.items():
            print(f"{part} is off: {why}")
    streaming = isinstance(trainer.train_dataset, IterableDataset)
    lengths = None if streaming else length_facts(trainer, len(splits.train))
    run.update(data=splits.facts | {"tokenized": lengths})
    started = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=checkpoint)

    ran = what_ran(trainer)
    measured = trainer.meter.facts(trainer.flops) | {
        "peak_memory": peak_memory(trainer.memory),
        "train_loss": result.training_loss,
    }
    measured |= {"train_seconds": round(time.perf_counter() - started, 2), "global_step": result.global_step}
    facts: dict = {"ran": ran | {"seed": args.seed}}
    if run.is_main and torch.cuda.is_available() and not streaming:
        measured["planned_memory"] = planned_memory(recipe, launch, fast, trainer)
    facts["losses"] = [[e["step"], e["loss"]] for e in trainer.state.log_history if "loss" in e]
    if stop.received:
        reason = f"signal {stop.received} at step {result.global_step} of {trainer.state.max_steps}"
        run.finish("interrupted", reason=reason, measured=measured, **facts)
        sys.exit(128 + stop.received)
    if not math.isfinite(result.training_loss):
        raise RuntimeError(
            f"diverged: the mean training loss is {result.training_loss}; the curve shows where it broke"
        )
    save_adapter(trainer, run)
    if trainer.eval_dataset is not None:
        loss = trainer.validation_loss()
        measured |= {"validation_loss": loss, "validation_perplexity": math.exp(loss)}
    compute = getattr(torch, COMPUTE_DTYPE[PRECISIONS[args.mixed_precision]])
    measured |= share_of_limit(measured, trainer.accelerator.device, compute, launch.world_size)
    run.finish("succeeded", measured=measured, **facts)
    if run.is_main:
        print_summary(run, ran, measured, splits.facts | {"tokenized": lengths})
    trainer.accelerator.end_training()


def save_adapter(trainer: LabTrainer, run: Run) -> None:
    """Adapter, tokenizer and template to a temporary folder (every rank takes part), then into place."""
    temporary = run.folder / ".adapter"
    trainer.save_model(str(temporary))
    if run.is_main:
        (temporary / "training_args.bin").unlink(missing_ok=True)
        shutil.rmtree(run.adapter, ignore_errors=True)
        temporary.rename(run.adapter)
    trainer.accelerator.wait_for_everyone()


def print_summary(run: Run, ran: dict, measured: dict, data: dict) -> None:
    """The run in a table."""
    memory = " ".join(str(rank.get("reserved_gb", rank.get("resident_gb"))) for rank in measured["peak_memory"])
    sizes = ", ".join(f"{name} {data[name]['rows']}" for name in ("train", "validation", "test"))
    share, lengths = measured["share_of_limit"], data["tokenized"]
    rows = {
        "precision, strategy": f"{ran['precision']}, {ran['strategy']} over {ran['world_size']}",
        "trainable parameters": f"{ran['trainable_parameters']:,} ({', '.join(ran['trainable_dtypes'])})",
        "rows": sizes,
        "cut, dropped at max_length": f"{lengths['cut']}, {lengths['dropped']} train rows"
        if lengths
        else "not known: a stream",
        "global batch": f"{ran['micro_batch']} x {ran['accumulation']} x {ran['world_size']}",
        "real tokens/s, rows/s": f"{measured['tokens_per_s']}, {measured['rows_per_s']}",
        "share of the limit": f"{share:.1%} of a {measured['limit']}" if share else "not measured: too few steps",
        "peak memory a rank (GB)": memory,
        **planned_row(measured),
        "first step, training (s)": f"{measured['time_to_first_step_s']}, {measured['train_seconds']}",
        "train loss": f"{measured['train_loss']:.4f}",
        "validation loss": f"{measured['validation_loss']:.4f}" if "validation_loss" in measured else "no split",
    }
    print(f"\n{run.folder}: succeeded")
    for name, value in rows.items():
        print(f"  {name:<28}{value}")
    print(f"\nNext: python eval/quality.py --run {Path(run.folder)}")


def planned_row(measured: dict) -> dict[str, str]:
    """Allocated memory of the rank with the most beside what the planner says (GPUs only)."""
    plan = measured.get("planned_memory", {})
    if "allocated_gb" not in plan:
        return {"planned memory": plan["reason"]} if plan else {}
    peak = max(rank["allocated_gb"] for rank in measured["peak_memory"])
    off = plan["allocated_gb"] / peak - 1
    return {"allocated, planned (GB)": f"{peak}, {plan['allocated_gb']} ({off:+.1%})"}


if __name__ == "__main__":
    main(sys.argv[1:])
