"""4-bit weights train and answer alike on every CPU, before an evaluation and after it."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from sftlab.models.loading import load_weights

IDS = torch.tensor([list(range(40, 56))])


@pytest.fixture(autouse=True)
def _a_cpu_that_packs_anew(monkeypatch):
    """Every CPU passes for one with AVX512-BF16; no kernel runs on it."""
    begin = Linear4bit.__init__

    def begins(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self.support_avx512bf16_for_cpu = True

    monkeypatch.setattr(Linear4bit, "__init__", begins)


@pytest.fixture
def model(base, tmp_path):
    config = AutoConfig.from_pretrained(base, hidden_size=128, intermediate_size=128, head_dim=64)
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    kwargs = {"trust_remote_code": False, "dtype": torch.float32}
    loaded = load_weights(str(tmp_path / "base"), kwargs, None, four)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(loaded, lora)


def gradients(model):
    model.train()
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: one.grad for name, one in model.named_parameters() if one.requires_grad}


def test_an_evaluation_leaves_the_gradients_as_they_were(model):
    before = gradients(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)
    after = gradients(model)
    assert before.keys() == after.keys()
    for name, gradient in before.items():
        assert torch.equal(after[name], gradient), name


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(32, 32), (33, 32), (100, 96), (64, 80), (40, 128)])
def test_weights_of_any_width_are_rounded_and_no_more(model, shape, kind):
    torch.manual_seed(5)
    weight = torch.randn(shape)
    for nested in (False, True):
        packed, state = quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
        error = dequantize_4bit(packed, state) - weight
        assert error.norm() < 0.13 * weight.norm()


def test_an_evaluation_has_the_logits_of_the_training(model):
    trained = model.train()(input_ids=IDS).logits
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=IDS).logits, trained)
