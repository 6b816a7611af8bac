"""A run stops before its first step where a packed row sees another."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from packed_training import build, leaking_attention, pack_on_a_cpu, reference_attention, train
from tiny_base import write_base_of

from sftlab.fastpath import varlen_attention
from sftlab.fastpath.float8 import freeze_in_float8
from sftlab.fastpath.float8_mlp import fuse_float8_mlps
from sftlab.training import packing_check


@pytest.fixture
def packed_with(monkeypatch):
    """Let packing run on a CPU, with the given attention in place of the kernels."""
    return partial(pack_on_a_cpu, monkeypatch)


def test_rows_that_see_one_another_stop_the_run(fields, packed_with):
    packed_with(leaking_attention)
    trainer = build(fields, packing="true", max_steps=1)
    with pytest.raises(RuntimeError, match=r"row 1's hidden states differ by .*--packing false"):
        train(trainer)


def test_rows_that_are_apart_pass_and_nothing_else_changes(fields, packed_with):
    packed_with(reference_attention)
    losses = []
    for checked in (True, False):
        trainer = build(fields, packing="true", max_steps=2, lora_dropout=0.1)
        if not checked:
            trainer._verify_packing = lambda model, inputs: None
        losses.append([entry["loss"] for entry in train(trainer)])
        assert trainer.model.config._attn_implementation == varlen_attention.NAME
    assert losses[0] == losses[1], "the check takes nothing of the random state"


@pytest.mark.parametrize("attention", [reference_attention, leaking_attention])
def test_other_experts_of_a_token_do_not_stop_the_run_and_other_rows_do(
    fields, packed_with, tmp_path, attention
):
    packed_with(attention)
    base = write_base_of("gpt_oss", tmp_path, head_dim=16, num_local_experts=4)
    trainer = build(fields | {"model_name_or_path": str(base)}, packing="true", max_steps=1)
    config = trainer.model.config

    def sent_elsewhere(router, _, output):  # every third token, where rows are packed
        logits, scores, indices = output
        packed = config._attn_implementation == varlen_attention.NAME
        return logits, scores, torch.where(elsewhere(indices) & packed, 3 - indices, indices)

    def elsewhere(indices):
        return torch.arange(len(indices))[:, None] % 3 == 0

    for router in trainer.model.modules():
        if type(router).__name__ == "GptOssTopKRouter":
            router.register_forward_hook(sent_elsewhere)
    if attention is reference_attention:
        assert len(train(trainer)) == 1
    else:
        with pytest.raises(RuntimeError, match=r"row \d's hidden states differ by"):
            train(trainer)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gemma2", {"head_dim": 16}),
        ("gpt_oss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ],
)
def test_a_model_whose_own_attention_is_eager_trains_packed(
    fields, packed_with, tmp_path, family, settings
):
    packed_with(reference_attention)
    base = write_base_of(family, tmp_path, **settings)
    trainer = build(fields | {"model_name_or_path": str(base)}, packing="true", max_steps=1)
    assert not trainer._base._supports_sdpa
    assert len(train(trainer)) == 1
    assert trainer.model.config._attn_implementation == varlen_attention.NAME


@pytest.mark.parametrize("attention", [reference_attention, leaking_attention])
def test_in_fp8_a_deep_model_passes_and_rows_that_see_one_another_do_not(
    fields, packed_with, tmp_path, attention
):
    """Rounded inputs of 24 layers of random weights make other values of everything."""
    packed_with(attention)
    config = {"num_hidden_layers": 24, "initializer_range": 0.3}
    base = write_base_of("llama", tmp_path, **config)
    trainer = build(fields | {"model_name_or_path": str(base)}, packing="true", max_steps=1)
    freeze_in_float8(trainer.model)
    assert fuse_float8_mlps(trainer.model) == 24
    (inputs,) = (batch for _, batch in zip(range(1), trainer.get_train_dataloader(), strict=False))

    def check() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            trainer._verify_packing(trainer.model, inputs)

    trainer.args.mixed_precision = "fp8"
    if attention is leaking_attention:
        with pytest.raises(RuntimeError, match=r"row 1's hidden states differ by"):
            check()
        return
    check()
    with pytest.MonkeyPatch.context() as rounded:
        rounded.setattr(packing_check, "inputs_in_16_bits", nullcontext)
        with pytest.raises(RuntimeError, match=r"row 0's hidden states differ by"):
            check()
