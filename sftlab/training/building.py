"""A recipe's trainer: its rows encoded, its model loaded, its adapter on it."""

from collections.abc import Sequence
from copy import copy

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from sftlab.config.launch import Launch
from sftlab.config.lora_start import changes_base, reads_first
from sftlab.config.recipe import Recipe
from sftlab.data.encoded_pairs import encode_pairs
from sftlab.data.encoded_rows import encode_splits
from sftlab.data.splits import Splits
from sftlab.fastpath.selection import FastPath
from sftlab.measurement.memory import MemorySplit
from sftlab.measurement.throughput import Meter
from sftlab.models.lora_config import lora_config
from sftlab.models.plain_adapter import initial_matrices
from sftlab.models.started_adapter import with_adapter
from sftlab.models.text_part import name_adapted_layers
from sftlab.startup.phases import ENCODING, WEIGHTS, phase_ended
from sftlab.training.adapter_start import AdapterStart
from sftlab.training.base_model import base_model
from sftlab.training.early_stopping import EarlyStopping
from sftlab.training.preference_trainer import PreferenceTrainer
from sftlab.training.recorded_trainer import RecordedTrainer
from sftlab.training.trainer import LabTrainer
from sftlab.training.truncation import refuse_lost_rows


def build_trainer(
    recipe: Recipe,
    launch: Launch,
    fast: FastPath,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    callbacks: Sequence[TrainerCallback] = (),
) -> RecordedTrainer:
    """Returns a recipe's trainer, with its model loaded and on the fast path. Seeds everything.

    Raises ValueError for rows that were tokenized with another template, tokenizer, length or mask
    than the recipe's.
    """
    args, meter = recipe.training, Meter()
    pairs = args.method == "dpo"
    encode = encode_pairs if pairs else encode_splits
    encoded = encode(splits, tokenizer, args)
    phase_ended(ENCODING)
    facts = {name: one.facts for name, one in encoded.items()}
    refuse_lost_rows(facts, args, splits)
    train, validation = encoded["train"].rows, encoded["validation"].rows
    if getattr(args, "shuffle_dataset", False):
        train = train.shuffle(seed=args.seed)
    measured = torch.cuda.is_available() if args.measure_memory is None else args.measure_memory
    memory = MemorySplit() if measured else None
    if args.early_stopping_patience:
        stopping = EarlyStopping(args.early_stopping_patience, args.early_stopping_threshold)
        callbacks = [*callbacks, stopping]
    if not pairs:
        args.packing = False  # trl's own would change which rows a step has
    args = copy(args)  # what follows is no setting of the recipe
    if not pairs:
        args.dataset_kwargs = (args.dataset_kwargs or {}) | {"skip_prepare_dataset": True}
    # the rows become input_ids and labels when read, from columns that no model takes
    args.remove_unused_columns = False
    start = AdapterStart(recipe) if reads_first(recipe.model.init_lora_weights) else None
    set_seed(args.seed)
    model = with_adapter(base_model(recipe, fast), recipe.model)
    phase_ended(WEIGHTS)
    trainer = (PreferenceTrainer if pairs else LabTrainer)(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation if len(validation) else None,
        processing_class=tokenizer,
        peft_config=None if recipe.model.adapter_name_or_path else lora_config(recipe.model),
        callbacks=[*callbacks, meter, *([memory] if memory else [])],
        meter=meter,
        memory=memory,
        row_facts=facts,
        launch=launch,
        fast=fast,
    )
    if recipe.model.use_peft:
        name_adapted_layers(trainer.model)
    if changes_base(recipe.model.init_lora_weights):
        trainer.initial_matrices = initial_matrices(trainer.model)
    if start:
        trainer.begin_adapter_with(start)
    return trainer
