"""LoRA on a layer that the model's forward does not call trains nothing, and a run says so."""

import logging

import pytest
import torch
from conftest import load_script, short_fields
from packed_training import build, train
from peft import LoraConfig, get_peft_model
from tiny_base import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sftlab.training import recorded_trainer
from sftlab.training.verification import verify_gradients

models = load_script("docs/make_models.py")


@pytest.fixture
def mamba(rows, tmp_path):
    """Fields of a run of a tiny Mamba, whose mixer reads the weight of dt_proj itself."""
    config = AutoConfig.for_model(**models.config_of("Mamba").to_dict() | {
        "vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
    })  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    byte_tokenizer().save_pretrained(tmp_path / "mamba")
    more = {"per_device_train_batch_size": "4", "lora_dropout": "0", "packing": "false"}
    return short_fields(tmp_path / "mamba", rows, tmp_path / "run") | more


def test_lora_on_layers_that_are_not_called_is_refused(mamba):
    trainer = build(mamba | {"lora_target_modules": ["in_proj", "dt_proj"]}, max_steps=2)
    said = r"LoRA on dt_proj has no effect: .*--exclude_modules dt_proj$"
    with pytest.raises(RuntimeError, match=said):
        train(trainer)
    assert trainer.state.global_step == 0


def test_lora_on_layers_that_are_called_trains(mamba, caplog):
    with caplog.at_level(logging.WARNING):
        train(build(mamba | {"lora_target_modules": ["in_proj", "x_proj"]}, max_steps=1))
    assert "no gradient" not in caplog.text


def test_gradients_are_looked_at_once_where_the_first_step_is_complete(
    base, rows, tmp_path, monkeypatch
):
    fields = short_fields(base, rows, tmp_path / "run") | {"per_device_train_batch_size": "2"}
    trainer = build(fields, max_steps=3)
    micro_batches, looked_at = [], []
    backward = trainer.forward_and_backward

    def counted(*args, **kwargs):
        micro_batches.append(None)
        return backward(*args, **kwargs)

    def look(model):
        looked_at.append(len(micro_batches))

    monkeypatch.setattr(trainer, "forward_and_backward", counted)
    monkeypatch.setattr(recorded_trainer, "verify_gradients", look)
    train(trainer)
    assert trainer.state.global_step == 3
    assert looked_at == [trainer.args.gradient_accumulation_steps] and looked_at[0] > 1


def test_some_layers_without_a_gradient_are_said(base, rows, tmp_path, caplog, monkeypatch):
    trainer = build(short_fields(base, rows, tmp_path / "run"), max_steps=1)
    backward = trainer.forward_and_backward
    first = next(
        p for n, p in trainer.model.named_parameters() if "layers.0" in n and "lora_B" in n
    )
    name = next(n for n, p in trainer.model.named_parameters() if p is first)
    target = name.partition(".lora_B")[0]

    def without_one(*args, **kwargs):
        loss = backward(*args, **kwargs)
        for n, p in trainer.model.named_parameters():
            if n.startswith(target):
                p.grad = None
        return loss

    monkeypatch.setattr(trainer, "forward_and_backward", without_one)
    with caplog.at_level(logging.WARNING):
        train(trainer)
    assert f"LoRA layers get no gradient, first {target}: the model" in caplog.text


def test_an_expert_that_no_token_came_to_is_not_meant():
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    for layer in base.model.layers:
        layer.experts = torch.nn.ModuleList([torch.nn.Linear(16, 16)])
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "experts.0"]))
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert sum(p.grad is None for p in model.parameters() if p.requires_grad) == 4
    assert verify_gradients(model) is None
