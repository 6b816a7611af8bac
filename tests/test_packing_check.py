"""A run stops before its first step where a packed row sees another."""

from functools import partial

import pytest
from packed_training import build, leaking_attention, pack_on_a_cpu, reference_attention, train

from sftlab.fastpath import varlen_attention


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
