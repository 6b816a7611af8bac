"""Fine-tune a causal language model with LoRA on trl's trainers; writes a run directory.

python recipes/sft.py --config_file accelerate_configs/cpu.yaml \
    --config recipes/demo/attn_r16.yaml
python recipes/sft.py --config_file accelerate_configs/ddp.yaml --num_processes 4 \
    --config recipes/llama3.2-1b/attn_r16.yaml [--any_field value]

`accelerate launch --config_file LAUNCH.yaml recipes/sft.py ...` starts the same training. It adds
a traceback of its own to every training that does not succeed, and the sentence again at its end.

The fields are those of trl's ModelConfig and SFTConfig and of sftlab/config/recipe.py; a recipe
with `method: dpo` has those of DPOConfig instead. The command line beats the YAML. After an
interruption the same command resumes the run. A finished run is replaced only with --overwrite, and
trains on with --extend and more steps or epochs.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that warn)
import sftlab.startup.launcher  # it may replace this process
import sftlab.startup.single_process  # before they see the devices
import sftlab.startup.preload  # noqa: F401

import atexit
import faulthandler
import gc
import math
import os
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import IterableDataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput

from sftlab.config.launch import COMPUTE_DTYPE, PRECISIONS, Launch, check_devices, use_all_cpu_cores
from sftlab.config.machine_parts import check_machine_parts
from sftlab.config.parser import parse_recipe
from sftlab.config.recipe import Recipe
from sftlab.data.before_training import look_at_rows, template_refusals
from sftlab.data.chat_template import set_template
from sftlab.data.loss_check import end_tokens_of
from sftlab.data.model_limits import refuse_beyond_model
from sftlab.data.row_checks import trained_row_lines
from sftlab.data.row_notes import TURNS, fields_of
from sftlab.data.samplers import refuse_few_rows
from sftlab.data.splits import Splits, load_splits
from sftlab.data.template_facts import template_facts
from sftlab.data.tokenized_dataset import refuse_other_encoding
from sftlab.exit_messages import short
from sftlab.fastpath.kernel_warmup import start_compilers
from sftlab.fastpath.selection import FastPath, choose
from sftlab.measurement.hardware_limit import measure_mfu
from sftlab.models.adapter_names import check_adapter_names
from sftlab.models.loading import load_config, load_tokenizer
from sftlab.models.started_adapter import started_from
from sftlab.planning.plan import captures_by_itself, planned_memory
from sftlab.runs.environment import environment
from sftlab.runs.run_directory import Run, Start, must_match, read_run
from sftlab.startup.launcher import reported_to_launcher
from sftlab.startup.phases import CHECKS, DATA, IMPORTS, KERNELS, TRAINER, phase_ended
from sftlab.startup.waiting import says_if_long
from sftlab.training.building import build_trainer
from sftlab.training.determinism import compute_deterministically
from sftlab.training.early_stopping import stopped_early
from sftlab.training.first_step_wait import FirstStepWait
from sftlab.training.recorded_end import recorded_end, say_how_to_go_on
from sftlab.training.recorded_trainer import RecordedTrainer
from sftlab.training.save_adapter import after_training, save_adapter
from sftlab.training.start_leaks import refuse_tested_rows
from sftlab.training.stop_on_signal import Stopped, StopOnSignal
from sftlab.training.summary import summary_rows
from sftlab.training.truncation import length_facts, length_lines
from sftlab.training.verification import global_batch


def main(argv: list[str]) -> None:
    """Check everything, load, train, measure and save; run.json says how it ended."""
    phase_ended(IMPORTS)
    launch = Launch.from_environment()
    rank = int(os.environ.get("RANK", 0))
    try:
        check_devices(launch)
        use_all_cpu_cores(launch)
        recipe = parse_recipe(argv, launch)
        check_machine_parts(recipe)
        if recipe.training.deterministic:
            compute_deterministically()
        run, start = look(recipe, launch, rank)
        phase_ended(CHECKS)
    except ValueError as error:
        sys.exit(short(f"error: {error}") if rank == 0 else 2)
    with recorded_end(run, rank):
        stop = StopOnSignal()
        try:
            trainer, splits = prepare(recipe, launch, run, start, stop)
        except ValueError as error:
            run.fail(f"{error}", rank)
            sys.exit(short(f"error: {error}") if rank == 0 else 2)
        facts = train(trainer, recipe, run, start, stop, splits)
        finish(trainer, run, facts)


def look(recipe: Recipe, launch: Launch, rank: int) -> tuple[Run, Start]:
    """Look at the run directory on rank 0; every rank learns how the run starts.

    Nothing is written. Raises ValueError for a folder that the run may not be written to.
    """
    run = Run(recipe.training.output_dir, is_main=rank == 0)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder / "tensorboard")
    found, data = [None], recipe.data
    if run.is_main:
        asked = (data.overwrite, data.resume_anyway, data.extend)
        found = [run.look(recipe.facts(), launch.facts(), *asked)]
    if launch.world_size > 1:
        broadcast_object_list(found)
    run.began = False
    return run, found[0]


def begin(
    run: Run, start: Start, recipe: Recipe, launch: Launch, facts: Mapping[str, object]
) -> None:
    """Begin the run on rank 0, now that it can; the other ranks wait. Says how it starts."""
    refused: list[str | None] = [None]
    if run.is_main:
        try:
            start.warnings += run.begin(start, recipe.facts(), launch.facts(), **facts)
        except ValueError as error:
            refused = [f"{error}"]
    if launch.world_size > 1:
        broadcast_object_list(refused)
    if refused[0]:
        raise ValueError(refused[0])
    run.began = True
    if run.is_main:
        for warning in start.warnings:
            warn(warning)
        for line in start.says:
            print(line, flush=True)


def prepare(
    recipe: Recipe, launch: Launch, run: Run, start: Start, stop: StopOnSignal
) -> tuple[RecordedTrainer, Splits]:
    """Read tokenizer, data and model, and begin the run; returns the trainer and the splits.

    Raises ValueError for a mistake in the recipe, and for a resumed run whose data have changed.
    """
    model, training = recipe.model, recipe.training
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision, training)
    config = load_config(model.model_name_or_path, model.model_revision, training)
    if model.use_peft:
        check_adapter_names(model, config, launch, training.trust_remote_code)
    started = started_from(model)
    template = set_template(tokenizer, training.chat_template_path)
    fast = choose(recipe, config, launch)
    for part, go_on in (
        ("fused_lora", fast.continue_with_fused_lora),
        ("captured_step", fast.continue_with_captured_steps),
        ("float8_head", fast.continue_with_float8_head),
        ("shared_scales", fast.continue_with_shared_scales),
        ("kernels_with_lora", fast.continue_with_kernels_with_lora),
    ):
        if start.checkpoint and getattr(training, part, None) is None:
            # of a run that says nothing, it was off
            go_on(bool(start.must_match.get(part)), recipe.data.resume_anyway)
    if start.checkpoint:
        fast.continue_with_tile(start.must_match.get("attention_tile"), recipe.data.resume_anyway)
    compilers = start_compilers(recipe, config, fast)

    splits, facts = read_data(recipe, tokenizer, template)
    facts |= started
    looked = look_at_rows(tokenizer, config, splits, training, facts["template"])
    with training.main_process_first(desc="reading the rows of the run before"):
        looked.lines.extend(refuse_tested_rows(model, splits))
    for line in [*(f"note: {one}" for one in recipe.notes), *looked.lines] if run.is_main else []:
        print(line, flush=True)
    run.check(start, facts, recipe.data.resume_anyway)
    recorded = facts | {"loss": looked.facts}
    # what an earlier run trained is replaced only once this one is ready
    if not start.at_stake:
        begin(run, start, recipe, launch, recorded)

    phase_ended(DATA)
    now = environment()  # the trainer fills in fields of the recipe
    must = must_match(recipe.facts(), launch.facts(), now) | facts
    answers = None
    if getattr(training, "answers_during_training", None):  # preference tuning has none
        from sftlab.evaluation.answers_in_training import answers_in_training  # imports for 2 s

        answers = answers_in_training(training, splits, tokenizer, config)
    callbacks = [stop, FirstStepWait(fast.compile_layers)]
    trainer = trainer_of(recipe, launch, fast, tokenizer, config, splits, callbacks)
    fast.refuse_other_mixers(start.must_match.get("mixers"), recipe.data.resume_anyway)
    if answers:
        trainer.answer = answers
    for _, rows in trainer.sequences()[:1] if run.is_main else []:
        ends = end_tokens_of(tokenizer, config.get_text_config().eos_token_id)
        for line in trained_row_lines(rows, tokenizer, ends, training.max_length):
            print(line, flush=True)
    if start.at_stake:
        trainer.checkpointer.refuse_full_disk(run.made_bytes)
        begin(run, start, recipe, launch, recorded)
    captures = [captures_by_itself(recipe, launch, fast, trainer)]
    if launch.world_size > 1:  # GPUs of two kinds would not agree
        broadcast_object_list(captures)
    if captures[0]:
        trainer.capture_steps()
    for part in (
        *("fused_lora", "captured_step", "float8_head", "shared_scales", "kernels_with_lora"),
        *("mixers", "attention_tile"),
    ):
        must[part] = getattr(fast, part)
    trainer.checkpointer.must_match, trainer.checkpointer.hardware = must, now["hardware"]
    phase_ended(TRAINER)
    with says_if_long("compiling the kernels"):
        error = compilers.exception()
    phase_ended(KERNELS)
    if error:
        warn(f"kernels are compiled in the first step, not before it: {error}")
    if run.is_main:
        for part, why in fast.reasons.items():
            print(f"{part} is off: {why}")
    return trainer, splits


def read_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[Splits, dict[str, Any]]:
    """Read and split the rows; returns the splits, and the facts `data` and `template`.

    `template` says where the tokenizer's chat template comes from. Raises ValueError for too few
    rows, and for tokens that were made otherwise.
    """
    data, training = recipe.data, recipe.training
    with (
        training.main_process_first(desc="reading the data set"),
        says_if_long(f"reading the data set {data.dataset_name}"),
    ):
        splits = load_splits(data, training.dataset_num_proc)
    # how many sequences a conversation of several answers is, its template decides, and long
    # documents are several
    one_each = TURNS not in splits.facts["rows_with"] and "text" not in splits.facts["shape"]
    known = not data.dataset_streaming and one_each
    rows = len(splits.train) if known else None
    if splits.tokens:
        refuse_other_encoding(splits.tokens, tokenizer, training)
        rows = splits.tokens["tokenized"]["train"]["kept"]
    if rows is not None:
        refuse_few_rows(rows, data.global_batch_size)
    fields = fields_of(splits.facts["rows_with"])
    return splits, {
        "data": splits.facts,
        "template": template_facts(tokenizer, template, fields),
    }


def trainer_of(
    recipe: Recipe,
    launch: Launch,
    fast: FastPath,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    splits: Splits,
    callbacks: list[TrainerCallback],
) -> RecordedTrainer:
    """Load the weights and encode the rows; returns the trainer.

    Raises ValueError for rows that the template refuses, that `max_length` leaves nothing of, or
    that the model cannot take.
    """
    training = recipe.training
    loading = f"loading the weights of {recipe.model.model_name_or_path} and encoding the rows"
    with template_refusals(tokenizer, splits), says_if_long(loading):
        trainer = build_trainer(recipe, launch, fast, tokenizer, splits, callbacks)
    for name, rows in trainer.sequences():
        refuse_beyond_model(rows, name, config, training.max_length)
    return trainer


def train(
    trainer: RecordedTrainer,
    recipe: Recipe,
    run: Run,
    start: Start,
    stop: StopOnSignal,
    splits: Splits,
) -> dict[str, Any]:
    """Train to the end; returns what ran, the losses and what was measured, for run.json.

    Exits with status 128 + signal if the training was stopped. Raises RuntimeError if it ended
    early or diverged.
    """
    streaming = isinstance(trainer.train_dataset, IterableDataset)
    names, found = [one["dataset"] for one in splits.facts.get("sources", [])], trainer.row_facts
    lengths = None if streaming else length_facts(found["train"], trainer.args, names)
    run.update(data=splits.facts | {"tokenized": lengths})
    for line in length_lines(lengths, trainer.args) if lengths and run.is_main else []:
        print(line, flush=True)
    trainer.checkpointer.check_room()
    try:
        result = trainer.train(resume_from_checkpoint=start.checkpoint)
    except Stopped:
        if not stop.agreed:
            raise
        result = None
    state, ran = trainer.state, trainer.what_ran() | {"seed": trainer.args.seed}
    measured = trainer.meter.facts(trainer.flops) | {
        "peak_memory": trainer.peak_memory.of_all_ranks(),
        "train_loss": result.training_loss if result else None,
        "train_seconds": round(trainer.clock.seconds, 2),
        "checkpoints": trainer.checkpointer.facts(),
        "global_step": state.global_step,
    }
    if capture := getattr(trainer, "capture", None):  # preference tuning has none
        measured["captured_step"] = capture.facts()
    if streaming:
        measured["trained_on"] = trainer.source_counts.facts(names or [recipe.data.dataset_name])
    if run.is_main and torch.cuda.is_available() and not streaming:
        measured["planned_memory"] = planned_memory(recipe, trainer.launch, trainer.fast, trainer)
    losses = [[entry["step"], entry["loss"]] for entry in state.log_history if "loss" in entry]
    facts = {"ran": ran, "losses": losses, "measured": measured}
    if result is None:
        reason = f"signal {stop.agreed} at step {state.global_step} of {state.max_steps}"
        skipped = trainer.checkpointer.skipped
        unsaved = [one for one in skipped if one.startswith(f"step {state.global_step}:")]
        run.finish("interrupted", reason="; ".join([reason, *unsaved]), **facts)
        say_how_to_go_on(run)
        sys.exit(128 + stop.agreed)
    if early := stopped_early(trainer):
        measured["stopped_early"] = early
        if run.is_main:
            print(early, flush=True)
    refuse_incomplete(trainer, result)
    return facts


def refuse_incomplete(trainer: RecordedTrainer, result: TrainOutput) -> None:
    """Raise RuntimeError if the training ended before its last step unasked, or diverged."""
    state = trainer.state
    if state.global_step < state.max_steps and not stopped_early(trainer):
        raise RuntimeError(
            f"the training ended at step {state.global_step} of {state.max_steps}: a pass over the "
            f"stream has no {global_batch(trainer.args)} rows, which one step takes"
        )
    if not math.isfinite(result.training_loss):
        raise RuntimeError(
            f"diverged: the mean training loss is {result.training_loss}; the curve shows where it "
            "broke"
        )


def finish(trainer: RecordedTrainer, run: Run, facts: dict[str, Any]) -> None:
    """Save the adapter, measure validation loss and MFU, end run.json, and print the summary."""
    args, measured = trainer.args, facts["measured"]
    if args.save_adapter:
        with after_training(trainer, "saving the adapter"):
            save_adapter(trainer, run)
    if trainer.eval_dataset is not None:
        with after_training(trainer, "measuring the validation loss"):
            measured |= trainer.validation()
    with after_training(trainer, "measuring the MFU"):
        compute = getattr(torch, COMPUTE_DTYPE[PRECISIONS[args.mixed_precision]])
        device, world_size = trainer.accelerator.device, trainer.launch.world_size
        measured |= measure_mfu(measured, device, compute, world_size)
    run.finish("succeeded", **facts)
    if run.is_main:
        print(f"\n{run.folder}: succeeded")
        for name, value in summary_rows(read_run(run.folder)).items():
            print(f"  {name:<28}{value}")
        if args.save_adapter:
            # late: they import what scores texts
            from sftlab.export.formats import end_ids
            from sftlab.export.model_card import adapter_card

            ends = end_ids(trainer.model, trainer.processing_class)
            card = adapter_card(read_run(run.folder), run.adapter, ends)
            card.save(run.adapter / "README.md")
            script = "preferences" if args.method == "dpo" else "quality"
            print(f"\nNext: python eval/{script}.py --run {shlex.quote(str(run.folder))}")
        else:
            print("\nThe adapter was not saved (save_adapter: false)")
    trainer.accelerator.end_training()


def warn(message: str) -> None:
    """Print a warning."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    faulthandler.enable()
    # the interpreter's last collection would walk over every module for seconds
    atexit.register(gc.freeze)
    with reported_to_launcher():
        main(sys.argv[1:])
