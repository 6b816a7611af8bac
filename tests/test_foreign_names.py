"""Names of other programs are answered with this project's name, not with a chance neighbour."""

import dataclasses

import pytest

from sftlab.config.field_effects import REFUSED
from sftlab.config.foreign_names import ANSWERS, SAME, unknown_field
from sftlab.config.recipe import DataArguments, ModelArguments, TrainingArguments

GROUPS = (DataArguments, TrainingArguments, ModelArguments)
KNOWN = {field.name for group in GROUPS for field in dataclasses.fields(group)}
HERE = {
    "torch_dtype": "dtype",
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "sequence_len": "max_length",
    "micro_batch_size": "per_device_train_batch_size",
    "cutoff_len": "max_length",
    "lora_target": "lora_target_modules",
    "base_model": "model_name_or_path",
    "random_state": "seed",
    "max_packed_sequence_len": "max_length",
    "moe_aux_loss_coef": "router_aux_loss_coef",
    "accumulate_grad_batches": "gradient_accumulation_steps",
}
ANSWERED = (
    *("loraplus_lr_embedding", "pissa_init", "group_by_length", "warmup_ratio"),
    *("use_lora", "use_qlora", "neat_packing", "add_tokens", "disable_gradient_checkpointing"),
    *("enable_liger_kernel", "strategy", "hf_hub_token", "dataset_prepared_path", "train_on_eos"),
)


def test_the_table_names_fields_that_exist_and_none_that_is_a_field_itself():
    assert set(SAME.values()) <= KNOWN - set(REFUSED)
    assert (set(SAME) | set(ANSWERS)) & KNOWN == set()
    assert not set(SAME) & set(ANSWERS)
    assert len(SAME) + len(ANSWERS) >= 60


@pytest.mark.parametrize(("name", "here"), HERE.items(), ids=HERE)
def test_a_name_of_another_program_is_mapped(name, here):
    assert unknown_field(name, KNOWN) == f"unknown field {name!r}: that is {here} here"


@pytest.mark.parametrize("name", ANSWERED)
def test_a_name_without_a_field_here_is_answered(name):
    said = unknown_field(name, KNOWN)
    assert "did you mean" not in said and len(said.split()) > 6


def test_no_name_is_sent_to_a_field_that_is_refused():
    for refused in REFUSED:
        assert f"did you mean {refused!r}" not in unknown_field(f"{refused}s", KNOWN)


def test_a_misspelling_is_corrected_and_what_is_far_from_every_field_is_not():
    assert unknown_field("lora_alfa", KNOWN).endswith("did you mean 'lora_alpha'?")
    assert unknown_field("learning-rat", KNOWN).endswith("did you mean 'learning_rate'?")
    for far in ("ddp", "megatron_size", "quantum", "resize_vocab", "reward_model"):
        assert "did you mean" not in unknown_field(far, KNOWN), far
