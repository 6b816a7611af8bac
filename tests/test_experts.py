"""Mixtures of experts: which product they take, and that both products are the same."""

import copy

import pytest
import torch
from conftest import load_script, short_fields
from packed_training import build, examples, losses_and_gradients, train, with_trained_lora
from tiny_base import byte_tokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GraniteMoeConfig

from sftlab.fastpath.experts import GROUPED, ONE_BY_ONE, take_experts_product
from sftlab.measurement.flops import flops_per_token
from sftlab.models.layers import decoder_of

models = load_script("docs/make_models.py")
MIXTURES = ["Qwen 3 MoE", "Mixtral", "gpt-oss", "DeepSeek V3", "Granite MoE"]
IDS = torch.arange(3, 67)[None]


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")


@pytest.mark.parametrize("family", MIXTURES)
def test_both_products_have_the_same_states_and_gradients(family):
    one_by_one = models.model_of(family).train().requires_grad_()
    grouped = copy.deepcopy(one_by_one)
    one_by_one.set_experts_implementation(ONE_BY_ONE)
    grouped.set_experts_implementation(GROUPED)
    for model in (one_by_one, grouped):
        states = decoder_of(model)(input_ids=IDS, use_cache=False).last_hidden_state
        states.square().sum().backward()
    right = dict(one_by_one.named_parameters())
    compared = 0
    for name, parameter in grouped.named_parameters():
        if right[name].grad is not None:
            apart = (parameter.grad - right[name].grad).norm() / right[name].grad.norm()
            assert apart < 1e-4, name
            compared += ".experts." in name
    assert compared >= 2


@pytest.mark.parametrize("family", MIXTURES)
def test_flops_are_those_that_torch_counts(family):
    model = models.model_of(family)
    model.set_experts_implementation(ONE_BY_ONE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder_of(model)(input_ids=IDS, use_cache=False)
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for name, n in counted.items() if str(name).endswith(("mm", "addmm")))
    attention = sum(n for name, n in counted.items() if str(name).endswith("bmm"))
    assert (products - attention) / IDS.numel() == flops_per_token(model).token / 2


@pytest.mark.parametrize(
    ("dtype", "precision", "taken", "why"),
    [
        (torch.bfloat16, "bf16", GROUPED, None),
        (torch.float32, "bf16", ONE_BY_ONE, "knows no autocast"),
        (torch.bfloat16, "fp16", ONE_BY_ONE, "knows no autocast"),
        (torch.float32, "fp32", ONE_BY_ONE, "knows no autocast"),
    ],
)
def test_the_grouped_product_is_taken_where_it_computes_in_bf16(
    on_a_gpu, dtype, precision, taken, why
):
    model = models.model_of("Qwen 3 MoE").to(dtype)
    found, reason = take_experts_product(model, precision)
    assert found == taken == model.config._experts_implementation
    assert (why in reason) if why else reason is None


def test_it_is_not_taken_where_its_kernels_do_not_run(on_a_gpu, monkeypatch):
    model = models.model_of("Mixtral").bfloat16()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    old = "a GPU is older than compute capability 8.0"
    assert take_experts_product(model, "bf16") == (ONE_BY_ONE, old)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    narrow = GraniteMoeConfig(**models.SMALL | {"intermediate_size": 12, "num_local_experts": 2})
    model = AutoModelForCausalLM.from_config(narrow, dtype=torch.bfloat16)
    assert take_experts_product(model, "bf16")[1] == "widths of the experts are no multiples of 8"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert take_experts_product(model, "bf16")[0] == ONE_BY_ONE


@pytest.mark.parametrize("family", ["Llama 2, 3; SmolLM2", "Llama 4 (text)"])
def test_models_whose_experts_are_no_choice_stay_as_they_are(on_a_gpu, family):
    model = models.model_of(family).bfloat16()
    before = model.config._experts_implementation
    assert take_experts_product(model, "bf16") == (None, None)
    assert model.config._experts_implementation == before


def test_a_mixture_trains_and_its_run_says_how(rows, tmp_path):
    config = models.config_of("Qwen 3 MoE")
    config.update(
        {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mixture")
    byte_tokenizer().save_pretrained(tmp_path / "mixture")
    fields = short_fields(tmp_path / "mixture", rows, tmp_path / "run")
    trainer = with_trained_lora(build(fields, lora_target_modules="q_proj", max_steps=1))
    assert trainer.what_ran()["experts_implementation"] == ONE_BY_ONE
    assert "grouped_experts" not in trainer.fast.reasons, "a CPU has no reason to say"
    nats, gradients = losses_and_gradients(trainer, examples(3))
    trainer._base.set_experts_implementation(GROUPED)
    other, found = losses_and_gradients(trainer, examples(3))
    torch.testing.assert_close(nats, other, atol=1e-5, rtol=1e-4)
    assert all((found[n] - g).norm() <= 1e-3 * g.norm() for n, g in gradients.items())
    assert len(train(trainer)) == 1
