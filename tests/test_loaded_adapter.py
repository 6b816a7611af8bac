"""An adapter that a model was given is the one that was saved, or nothing goes on."""

import pytest
import torch
from conftest import short_fields
from packed_training import build, train
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_base import byte_tokenizer
from torch import nn
from transformers import LagunaConfig, LagunaForCausalLM, LlamaConfig, LlamaForCausalLM

from sftlab.models.loaded_adapter import refuse_other_tensors

TINY = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 512, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY)),
    "laguna": lambda: LagunaForCausalLM(
        LagunaConfig(**TINY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    ),
}


@pytest.fixture(params=MODELS)
def base(request, tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / request.param
    MODELS[request.param]().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def saved(base, folder, targets):
    kind = MODELS[base.name]
    model = get_peft_model(kind().from_pretrained(base), LoraConfig(r=2, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(kind().from_pretrained(base), folder)


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"])
def test_an_adapter_is_loaded_whole_or_refused(base, tmp_path, targets):
    """transformers' rule for Laguna's shared experts takes peft's name of them for another."""
    model = saved(base, tmp_path / "adapter", targets)
    if (base.name, targets) == ("laguna", "all-linear"):
        with pytest.raises(ValueError, match=r"6 of 32 tensors of .*\.shared_experts\.down_proj"):
            refuse_other_tensors(model, tmp_path / "adapter")
    else:
        refuse_other_tensors(model, tmp_path / "adapter")


def test_a_training_does_not_go_on_with_another_adapter(base, rows, tmp_path):
    fields = short_fields(base, rows, tmp_path / "run") | {"lora_target_modules": "all-linear"}
    fields |= {"lora_dropout": "0", "max_steps": "2", "save_steps": "1"}
    train(build(fields))
    again = build(fields, overwrite="true", max_steps="3")
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    if base.name == "llama":
        again.train(resume_from_checkpoint=checkpoint)
        assert again.state.global_step == 3
        return
    with pytest.raises(ValueError, match="are not in the model that peft loaded them into"):
        again.train(resume_from_checkpoint=checkpoint)
