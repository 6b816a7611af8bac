"""Fine-tune a causal language model with LoRA on trl's SFTTrainer; writes a run directory.

accelerate launch --config_file accelerate_configs/cpu.yaml recipes/sft.py --config recipes/demo/attn_r16.yaml
accelerate launch --config_file accelerate_configs/ddp.yaml recipes/sft.py \
    --config recipes/llama3.2-1b/attn_r16.yaml [--any_field value]

Fields are those of trl's ModelConfig and SFTConfig and of sftlab/config/parser.py; the command line
beats the YAML. Start the same command again after an interruption, and it continues. A finished run
is replaced only with --overwrite.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.single_process  # before they see the devices
import sftlab.startup.preload  # noqa: F401

import atexit
import faulthandler
import gc
import math
import os
import shutil
import sys
from concurrent.futures import Future
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from sftlab.config.parser import parse_recipe
from sftlab.config.recipe import Recipe
from sftlab.data.splits import Splits, load_splits
from sftlab.training.determinism import compute_deterministically
from sftlab.fastpath.kernel_warmup import start_compilers
from sftlab.fastpath.selection import FastPath, choose
from sftlab.files import sync, sync_tree
from sftlab.planning.plan import planned_memory
from sftlab.training.stop_on_signal import Stopped, StopOnSignal
from sftlab.config.launch import COMPUTE_DTYPE, PRECISIONS, Launch, check_devices, use_all_cpu_cores
from sftlab.measurement.hardware_limit import share_of_limit
from sftlab.measurement.memory import peak_memory
from sftlab.models.loading import check_target_modules, load_config, load_tokenizer
from sftlab.data.samplers import refuse_few_rows
from sftlab.training.verification import length_facts, refuse_lost_rows, what_ran
from sftlab.training.checkpointing import is_full
from sftlab.runs.environment import environment
from sftlab.runs.run_directory import Run, Start, must_match
from sftlab.data.chat_template import set_template, template_hash
from sftlab.data.tokenized_dataset import refuse_other_encoding
from sftlab.training.trainer import LabTrainer, build_trainer


def main(argv: list[str]) -> None:
    """Check everything, then load, train, save and measure; run.json says how it ended."""
    launch = Launch.from_environment()
    rank = int(os.environ.get("RANK", 0))
    try:
        check_devices(launch)
        use_all_cpu_cores(launch)
        recipe = parse_recipe(argv, launch)
        if recipe.training.deterministic:
            compute_deterministically()
        run, start = begin(recipe, launch, rank)
    except ValueError as error:
        sys.exit(f"error: {error}" if rank == 0 else 2)
    try:
        lab(recipe, launch, run, start, rank)
    except Stopped as stopped:
        run.finish("interrupted", reason=f"signal {stopped.number}: stopped at once")
        sys.exit(128 + stopped.number)
    except BaseException as error:
        if is_full(error):
            run.finish("interrupted", reason=f"{error}")
            sys.exit(f"error: {error}")
        if not isinstance(error, SystemExit):
            run.fail(f"{type(error).__name__}: {error}", rank)
        raise


def begin(recipe: Recipe, launch: Launch, rank: int) -> tuple[Run, Start]:
    """Open the run directory on rank 0; every rank learns how the run starts."""
    run = Run(recipe.training.output_dir, is_main=rank == 0)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder / "tensorboard")
    data = recipe.data
    found = [
        run.start(recipe.facts(), launch.facts(), data.overwrite, data.resume_anyway)
        if run.is_main
        else None
    ]
    if launch.world_size > 1:
        broadcast_object_list(found)
    if run.is_main:
        for warning in found[0].warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
    return run, found[0]


def lab(recipe: Recipe, launch: Launch, run: Run, start: Start, rank: int) -> None:
    """Read the data, check that the run goes on with what it began with, train."""
    stop = StopOnSignal()
    try:
        tokenizer, template, fast, compilers = prepare(recipe, launch)
        with recipe.training.main_process_first(desc="reading the data set"):
            splits = load_splits(recipe.data, recipe.training.dataset_num_proc)
        if splits.tokens:
            refuse_other_encoding(splits.tokens, tokenizer, recipe.training)
        if not recipe.data.dataset_streaming:
            usable = (
                splits.tokens["tokenized"]["train"]["kept"] if splits.tokens else len(splits.train)
            )
            refuse_few_rows(usable, recipe.data.global_batch_size)
        facts = {
            "data": splits.facts,
            "template": {"source": template, "hash": template_hash(tokenizer)},
        }
        run.check(start, facts, recipe.data.resume_anyway)
        run.update(**facts)
        now = environment()
        must = must_match(recipe.facts(), launch.facts(), now) | facts
        trainer = build_trainer(recipe, launch, fast, tokenizer, splits, callbacks=[stop])
        refuse_lost_rows(trainer, splits)
    except ValueError as error:
        run.fail(f"{error}", rank)
        sys.exit(f"error: {error}" if rank == 0 else 2)
    if error := compilers.exception():
        print(
            f"warning: no kernel is ready before the first step: {error}",
            file=sys.stderr,
            flush=True,
        )
    trainer.resume.must_match, trainer.resume.hardware = must, now["hardware"]
    train(trainer, recipe, run, start, stop, splits)


def prepare(
    recipe: Recipe, launch: Launch
) -> tuple[PreTrainedTokenizerBase, str, FastPath, Future]:
    """Tokenizer with its template, the fast path and its compilers, after checking what the recipe
    targets.
    """
    name, revision = recipe.model.model_name_or_path, recipe.model.model_revision
    tokenizer = load_tokenizer(name, revision, recipe.training)
    config = load_config(name, revision, recipe.training)
    if recipe.model.use_peft:
        check_target_modules(
            config, recipe.model.lora_target_modules, recipe.training.trust_remote_code
        )
    template = set_template(tokenizer, recipe.training.chat_template_path)
    fast = choose(recipe, config, launch)
    return tokenizer, template, fast, start_compilers(recipe, config, fast)


def train(
    trainer: LabTrainer, recipe: Recipe, run: Run, start: Start, stop: StopOnSignal, splits: Splits
) -> None:
    """Train, save the adapter, measure, and write the run's end."""
    args, launch = trainer.args, trainer.launch
    if run.is_main:
        for part, why in trainer.fast.reasons.items():
            print(f"{part} is off: {why}")
    streaming = isinstance(trainer.train_dataset, IterableDataset)
    lengths = None if streaming else length_facts(trainer, len(splits.train))
    run.update(data=splits.facts | {"tokenized": lengths})
    trainer.resume.check_room()
    try:
        result = trainer.train(resume_from_checkpoint=start.checkpoint)
    except Stopped:
        if not stop.agreed:
            raise
        result = None
    ran, state = what_ran(trainer), trainer.state
    measured = trainer.meter.facts(trainer.flops) | {
        "peak_memory": peak_memory(trainer.memory, trainer.resume.earlier["peak"]),
        "train_loss": result.training_loss if result else None,
        "train_seconds": round(trainer.resume.seconds, 2),
        "checkpoints": trainer.resume.facts(),
        "global_step": state.global_step,
    }
    facts: dict = {"ran": ran | {"seed": args.seed}}
    if run.is_main and torch.cuda.is_available() and not streaming:
        measured["planned_memory"] = planned_memory(recipe, launch, trainer.fast, trainer)
    facts["losses"] = [[e["step"], e["loss"]] for e in state.log_history if "loss" in e]
    if result is None:
        unsaved = [
            one for one in trainer.resume.skipped if one.startswith(f"step {state.global_step}:")
        ]
        reason = "; ".join(
            [f"signal {stop.agreed} at step {state.global_step} of {state.max_steps}", *unsaved]
        )
        run.finish("interrupted", reason=reason, measured=measured, **facts)
        sys.exit(128 + stop.agreed)
    if state.global_step < state.max_steps:
        raise RuntimeError(
            f"the training ended at step {state.global_step} of {state.max_steps}: a pass over the "
            "stream has no "
            f"{trainer.global_batch} rows, which one step takes"
        )
    if not math.isfinite(result.training_loss):
        raise RuntimeError(
            f"diverged: the mean training loss is {result.training_loss}; the curve shows where it "
            "broke"
        )
    if args.save_adapter:
        save_adapter(trainer, run)
    if trainer.eval_dataset is not None:
        loss = trainer.validation_loss()
        measured |= {"validation_loss": loss, "validation_perplexity": math.exp(loss)}
    compute = getattr(torch, COMPUTE_DTYPE[PRECISIONS[args.mixed_precision]])
    measured |= share_of_limit(measured, trainer.accelerator.device, compute, launch.world_size)
    run.finish("succeeded", measured=measured, **facts)
    if run.is_main:
        print_summary(run, ran, measured, splits.facts | {"tokenized": lengths}, args.save_adapter)
    trainer.accelerator.end_training()


def save_adapter(trainer: LabTrainer, run: Run) -> None:
    """Adapter, tokenizer and template to a temporary folder (every rank takes part), then into
    place.
    """
    temporary = run.folder / ".adapter"
    if run.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(temporary))
    if run.is_main:
        (temporary / "training_args.bin").unlink(missing_ok=True)
        sync_tree(temporary)
        shutil.rmtree(run.adapter, ignore_errors=True)
        temporary.rename(run.adapter)
        sync(run.folder)
    trainer.accelerator.wait_for_everyone()


def print_summary(run: Run, ran: dict, measured: dict, data: dict, saved: bool) -> None:
    """The run in a table, and what comes next."""
    memory = " ".join(
        str(rank.get("reserved_gb", rank.get("resident_gb"))) for rank in measured["peak_memory"]
    )
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
        "share of the limit": f"{share:.1%} of a {measured['limit']}"
        if share
        else "not measured: too few steps",
        "peak memory a rank (GB)": memory,
        **planned_row(measured),
        "first step, training (s)": f"{measured['time_to_first_step_s']}, {measured['train_seconds']}",
        "train loss": f"{measured['train_loss']:.4f}",
        "validation loss": f"{measured['validation_loss']:.4f}"
        if "validation_loss" in measured
        else "no split",
    }
    print(f"\n{run.folder}: succeeded")
    for name, value in rows.items():
        print(f"  {name:<28}{value}")
    next_ = f"Next: python eval/quality.py --run {Path(run.folder)}"
    print(f"\n{next_ if saved else 'Nothing is kept of what was trained (save_adapter: false)'}")


def planned_row(measured: dict) -> dict[str, str]:
    """Allocated memory of the rank with the most beside what the planner says (GPUs only)."""
    plan = measured.get("planned_memory", {})
    if "allocated_gb" not in plan:
        return {"planned memory": plan["reason"]} if plan else {}
    peak = max(rank["allocated_gb"] for rank in measured["peak_memory"])
    off = plan["allocated_gb"] / peak - 1
    return {"allocated, planned (GB)": f"{peak}, {plan['allocated_gb']} ({off:+.1%})"}


if __name__ == "__main__":
    faulthandler.enable()
    # the interpreter's last collection would walk over every module for seconds
    atexit.register(gc.freeze)
    main(sys.argv[1:])
