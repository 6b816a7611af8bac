"""A merged weight is rounded once: to what is written, of the sum of base and adapter."""

import pytest
import torch
from conftest import write_base
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftlab.export.formats import merge


@pytest.fixture
def adapted(tmp_path):
    """A small model in float32 with an adapter that changes it, and what its weights come to."""
    write_base(tmp_path / "base")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    given = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(base, given)
    layer = model.get_decoder().layers[0].self_attn.q_proj
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2.0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    return model, tokenizer, (layer.weight + delta).detach()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_sum_is_rounded_and_not_its_parts(adapted, dtype):
    model, tokenizer, exact = adapted
    merged = merge(model, tokenizer, dtype, [1])
    assert merged.dtype == getattr(torch, dtype)
    found = merged.get_decoder().layers[0].self_attn.q_proj.weight
    assert torch.equal(found, exact.to(merged.dtype))


def test_16_bit_weights_are_widened_for_a_wider_export(adapted):
    model, tokenizer, _ = adapted
    layer = model.to(torch.bfloat16).get_decoder().layers[0].self_attn.q_proj
    a, b = (one["default"].weight.float() for one in (layer.lora_A, layer.lora_B))
    exact = layer.weight.float() + b @ a * 2.0
    merged = merge(model, tokenizer, "float16", [1])
    found = merged.get_decoder().layers[0].self_attn.q_proj.weight
    assert torch.equal(found, exact.to(torch.float16))
