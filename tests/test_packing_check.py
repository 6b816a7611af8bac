"""A run stops before its first step where a packed row sees another."""

import pytest
from packed_training import build, reference_attention, train
from torch.nn.functional import scaled_dot_product_attention

from sftlab.fastpath import varlen_attention


@pytest.fixture
def packed_with(monkeypatch):
    """Let packing run on a CPU, with the given attention in place of the kernels."""

    def use(attention):
        monkeypatch.setattr(varlen_attention, "why_not", lambda layers, longest: None)
        monkeypatch.setattr(varlen_attention, "varlen_attention", attention)

    return use


def leaking_attention(query, key, value, table, scale, *rest):
    """Causal attention over the whole batch, whatever row a token is of."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    return out.transpose(0, 1), None


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
