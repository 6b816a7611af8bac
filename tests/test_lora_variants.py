"""What the project knows of each LoRA variant is what peft does."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from sftlab.config.lora_variants import VARIANTS, allows_mixed_batches, float8_conflict, lora_scale
from sftlab.config.recipe import ModelArguments


def adapted(field):
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
    )
    adapter = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj"], **{field: True})
    return get_peft_model(LlamaForCausalLM(config), adapter).eval(), adapter


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_an_entry_says_what_peft_does(variant):
    model, adapter = adapted(variant.field)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    recipe = {"lora_alpha": 12, "lora_r": 4, variant.field: True}
    assert layer.scaling["default"] == pytest.approx(lora_scale(recipe))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    ends = [name.rpartition("q_proj.")[2].replace(".default", "") for name in names]
    parts = {end.removesuffix(".weight") for end in ends}
    assert parts == {"lora_A", "lora_B", *variant.trains}
    ids = torch.ones(2, 3, dtype=torch.long)
    if variant.mixed_batches:
        model(ids, adapter_names=["__base__", "default"])
    else:
        with pytest.raises(ValueError, match="adapter_names"):
            model(ids, adapter_names=["__base__", "default"])
    assert allows_mixed_batches(adapter) is variant.mixed_batches
    assert float8_conflict(adapter) == variant.float8_conflict


def test_recipes_have_the_field_of_every_variant():
    fields = {field.name for field in dataclasses.fields(ModelArguments)}
    assert {variant.field for variant in VARIANTS} <= fields


def test_plain_lora_is_no_variant():
    plain = SimpleNamespace(**{variant.field: False for variant in VARIANTS})
    assert lora_scale({"lora_alpha": 12, "lora_r": 4}) == 3.0
    with pytest.raises(ValueError, match="lora_alpha is '4x', expected a number"):
        lora_scale({"lora_alpha": "4x", "lora_r": 4})
    assert allows_mixed_batches(plain)
    assert float8_conflict(plain) is None
