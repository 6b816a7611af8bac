"""Today's families of models: what docs/models.md says of each, on a tiny model of it."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, load_script
from packed_training import examples, reference_attention
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.phi.modeling_phi import PhiDecoderLayer

from sftlab.data.collator import Collator, for_the_model
from sftlab.fastpath import fused_loss, varlen_attention
from sftlab.fastpath.packed_mixers import NOT_COMPILED, pack_mixers
from sftlab.models.layers import decoder_of, describe
from sftlab.models.own_logits import logit_changes
from sftlab.training.router_loss import leave_out_frozen_router

models = load_script("docs/make_models.py")
ROWS = [
    {name: [1 + i % 90 for i in values] if name == "input_ids" else values for name, values in
     {**row, "labels": [v if v < 0 else 1 + v % 90 for v in row["labels"]]}.items()}
    for row in examples(3, longest=40)
]  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    """What the page says of each family, found once."""
    return {family: models.row(family) for family in models.FAMILIES}


def test_the_page_is_what_the_code_says(rows):
    assert (ROOT / "docs" / "models.md").read_text() == models.page(rows)


def test_layers_that_are_cut_say_what_cuts_them(rows):
    cut = {family for family, found in rows.items() if found.compiled}
    assert cut == {family for family, found in rows.items() if found.compiled == NOT_COMPILED}
    assert {"Qwen3-Next", "Bamba", "Kimi Linear"} <= cut
    assert not {"Llama 2, 3; SmolLM2", "LFM2", "gpt-oss", "DeepSeek V3"} & cut


def test_a_layer_that_prints_is_cut(monkeypatch):
    own = PhiDecoderLayer.forward

    def printing(self, *args, **kwargs):
        torch._dynamo.graph_break()
        return own(self, *args, **kwargs)

    monkeypatch.setattr(PhiDecoderLayer, "forward", printing)
    assert "graph_break" in models.row("Phi-2").compiled


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_fused_loss_is_the_models_own(family, rows):
    if rows[family].fused_loss:
        pytest.skip(rows[family].fused_loss)
    model, batch = models.model_of(family), Collator(0, packed=False)(ROWS)
    inputs = {k: v for k, v in for_the_model(batch).items() if k != "labels"}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1)[batch["loss_positions"]]
        own = F.cross_entropy(logits, batch["targets"], reduction="none")
        fused_loss.add_frozen_head_loss(model, logit_changes(model))
        places = {"loss_positions": batch["loss_positions"], "targets": batch["targets"]}
        found = model(**inputs, **places)[0]
    assert (found - own).abs().max() < 1e-4


@pytest.mark.parametrize("family", models.FAMILIES)
def test_packed_rows_are_computed_as_rows_alone_are(family, rows, monkeypatch):
    if rows[family].packs:
        pytest.skip(rows[family].packs)
    monkeypatch.setattr(varlen_attention, "varlen_attention", reference_attention)
    varlen_attention.register(models.LONGEST)
    model = models.model_of(family)
    mixers = describe(model.config, type(model)).mixers > 0
    packed = for_the_model(Collator(0, packed=True, mixers=mixers)(ROWS))
    del packed["labels"]
    with torch.no_grad():
        alone = [
            decoder_of(model)(input_ids=torch.tensor([row["input_ids"]]), use_cache=False)
            for row in ROWS
        ]
        expected = torch.cat([one.last_hidden_state[0] for one in alone])
        other = AutoModelForCausalLM.from_config(model.config, attn_implementation="varlen")
        other.load_state_dict(model.state_dict())
        pack_mixers(other)
        found = decoder_of(other.eval())(**packed, use_cache=False).last_hidden_state[0]
    apart = (found[: len(expected)] - expected).norm() / expected.norm()
    assert apart < 1e-5


@pytest.mark.parametrize(
    "asked, trained, off",
    [(None, "q_proj", True), (None, "gate", False), (0.001, "q_proj", False)],
)
def test_the_loss_of_a_frozen_router_is_left_out(asked, trained, off):
    model = models.model_of("Qwen 3 MoE")
    model.config.output_router_logits = True
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name.split("."))
    args = SimpleNamespace(router_aux_loss_coef=asked)
    trainer = SimpleNamespace(aux_loss_enabled=True, args=args, model=model)
    said = leave_out_frozen_router(trainer)
    assert (said is not None, trainer.aux_loss_enabled) == (off, not off)
    assert model.config.output_router_logits == (not off)
