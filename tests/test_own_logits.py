"""The loss is the model's own, whatever its forward does to the logits after the head."""

import types

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from sftlab.fastpath import fused_loss
from sftlab.models.likelihood import likelihood, with_fused_head
from sftlab.models.own_logits import NO_CHANGES, logit_changes, own_log_probs_if_needed

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
# A family, and settings by which its logits are felt to change.
CHANGED = {
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 32, "logits_soft_cap": 2.0},
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 16},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.0625},
    "hyperclovax": {"logits_scaling": 0.3},
    "nanochat": {"final_logit_softcapping": 2.0},
}
# Families whose logits are the head's product: Phi's has a bias, OPT calls a part of its decoder.
PLAIN = {"phi": {}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}}


def family(name: str, **settings) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SMALL | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.float().eval().requires_grad_(False)


def shifted_forward(model: torch.nn.Module) -> torch.nn.Module:
    """A model whose forward does to its logits what no setting's name gives away."""
    forward = model.forward

    def own(self, *args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.logits = 1.5 * outputs.logits.tanh() + 0.2 * outputs.logits.roll(1, dims=-1)
        return outputs

    model.forward = types.MethodType(own, model)
    return model


def rows(count: int = 3) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 97, (count, 24), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :10] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def own_nats(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits.float()
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()))


def models():
    for name, settings in CHANGED.items():
        yield pytest.param(lambda n=name, s=settings: family(n, **s), id=name)
    yield pytest.param(
        lambda: shifted_forward(LlamaForCausalLM(LlamaConfig(**SMALL)).requires_grad_(False)),
        id="unnamed",
    )


def fused(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The fused loss of a batch's response tokens, on average."""
    following = batch["labels"][:, 1:]
    row, column = (following != -100).nonzero(as_tuple=True)
    positions = row * following.shape[1] + row + column
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    targets = following[row, column]
    return model(**inputs, loss_positions=positions, targets=targets)[0].mean()


def test_a_model_that_changes_its_logits_in_another_way_gets_no_fused_loss():
    model = shifted_forward(LlamaForCausalLM(LlamaConfig(**SMALL)).requires_grad_(False))
    assert "changes its logits" in logit_changes(model)


@pytest.mark.parametrize("name", [*CHANGED, *PLAIN])
def test_the_fused_loss_of_a_scaled_capped_or_biased_head_is_the_models_own(name):
    batch, nats, gradients = rows(), [], []
    for own in (True, False):
        model = family(name, **CHANGED.get(name, {}) | PLAIN.get(name, {}))
        changes = logit_changes(model)
        assert (changes == NO_CHANGES) == (name in PLAIN)
        weight = next(p for n, p in model.named_parameters() if "layers.0." in n)
        weight.requires_grad_()
        if own:
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        else:
            assert fused_loss.why_not(model) is None
            fused_loss.add_frozen_head_loss(model, changes)
            loss = fused(model, batch)
        loss.backward()
        nats.append(loss.item())
        gradients.append(weight.grad)
    assert nats[0] == pytest.approx(nats[1], abs=1e-4)
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("make", models())
def test_evaluations_score_by_the_models_own_logits(make):
    model, batch = make(), rows()
    own = own_nats(model, batch)
    found = likelihood(with_fused_head(model), [batch]).response
    assert found[:, 0].sum() / found[:, 1].sum() == pytest.approx(own, abs=1e-4)


def test_training_takes_the_models_own_loss_and_gradient():
    batch = rows()
    embedding = shifted_forward(family("llama")).get_input_embeddings().weight
    gradients, losses = [], []
    for fused in (False, True):
        model = shifted_forward(family("llama"))
        model.get_input_embeddings().weight.requires_grad_()
        if fused:
            add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
            assert "nats a token" in own_log_probs_if_needed(model)
            loss = model(**batch, fused_lm_head=True).loss
        else:
            logits = model(input_ids=batch["input_ids"]).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.get_input_embeddings().weight.grad)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert gradients[0].shape == embedding.shape
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_head_stays_fused(dtype):
    model = family("llama").to(dtype)
    assert logit_changes(model) == NO_CHANGES
    assert fused_loss.why_not(model) is None
    add_fused_lm_head(model)
    forward = model.forward
    assert own_log_probs_if_needed(model) is None
    assert model.forward == forward


def test_embeddings_of_images_beyond_the_head_are_left_out():
    model = family("llama")
    model.set_input_embeddings(torch.nn.Embedding(970, 32))
    assert logit_changes(model) == NO_CHANGES
    add_fused_lm_head(model)
    assert own_log_probs_if_needed(model) is None


def test_a_run_says_so_and_trains_the_models_own_loss(
    trained_here, fields, base, monkeypatch, tmp_path
):
    """A cap that nobody knows by name: fused_loss is off, with the reason."""
    original = LlamaForCausalLM.forward

    def capped(self, *args, **kwargs):
        outputs = original(self, *args, **kwargs)
        if getattr(outputs, "logits", None) is not None:
            outputs.logits = 0.5 * (outputs.logits / 0.5).tanh()
        return outputs

    monkeypatch.setattr(LlamaForCausalLM, "forward", capped)
    done = trained_here(fields | {"max_steps": "1"})
    assert "changes its logits" in done.stdout
