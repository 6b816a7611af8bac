"""Ways to begin a LoRA: the saved adapter belongs to the base model as it is."""

from pathlib import Path

import pytest
import torch
from conftest import read
from packed_training import assert_continues_exactly, build, with_trained_lora
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sftlab.evaluation.base_and_tuned import finished_run, load_pair
from sftlab.models.plain_adapter import make_plain

IDS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
STARTS = [
    ("pissa", "false"),
    *(
        pytest.param(*one, marks=pytest.mark.long)
        for one in (("pissa", "true"), ("pissa_niter_4", "false"), ("olora", "false"))
    ),
]


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize(("start", "rslora"), STARTS)
def test_what_is_saved_is_the_trained_model_on_the_plain_base(start, rslora, fields, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(fields["model_name_or_path"])
    trainer = build(fields, init_lora_weights=start, use_rslora=rslora)
    began = logits(trainer.model)
    assert torch.allclose(began, logits(base), atol=1e-4), "the untrained adapter changes nothing"
    weights = trainer.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    assert not torch.allclose(weights, base.model.layers[0].self_attn.q_proj.weight, atol=1e-3)
    trained = logits(with_trained_lora(trainer).model)
    assert not torch.allclose(trained, began, atol=1e-2)
    trainer.save_model(str(tmp_path / "adapter"))
    make_plain(tmp_path / "adapter", trainer.initial_matrices)
    tuned = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.allclose(logits(tuned), trained, atol=1e-4)
    with tuned.disable_adapter():
        assert torch.allclose(logits(tuned), began, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "orthogonal", "gaussian"])
def test_each_way_to_begin_continues_exactly(start, fields):
    assert_continues_exactly({**fields, "init_lora_weights": start})


def test_a_rank_that_a_layer_does_not_have_is_refused(fields):
    with pytest.raises(ValueError, match="lora_r is 20, and init_lora_weights pissa finds only 16"):
        build(fields, init_lora_weights="pissa", lora_r=20)


@pytest.mark.long
@pytest.mark.parametrize("start", ["pissa", "orthogonal"])
def test_a_run_is_evaluated_against_its_base(start, fields, trained_here):
    trained_here(fields | {"init_lora_weights": start, "lora_modules_to_save": "norm"})
    tensors = load_file(f"{fields['output_dir']}/adapter/adapter_model.safetensors")
    assert any("modules_to_save" in name or ".norm." in name for name in tensors)
    folder = Path(fields["output_dir"])
    model = load_pair(folder, finished_run(folder))
    found = read(fields["output_dir"])["measured"]["validation_loss"]
    assert found < 10
    with model.disable_adapter():
        base = AutoModelForCausalLM.from_pretrained(fields["model_name_or_path"])
        assert torch.allclose(logits(model), logits(base), atol=1e-4)


def test_biases_and_left_out_modules_are_trained_as_asked(fields):
    more = {"lora_bias": "true", "exclude_modules": "layers.0.self_attn.q_proj"}
    trainer = build(fields, **more)
    names = {name for name, one in trainer.model.named_parameters() if one.requires_grad}
    assert any(name.endswith("lora_B.default.bias") for name in names)
    assert not any("layers.0.self_attn.q_proj" in name for name in names)
    assert any("layers.1.self_attn.q_proj" in name for name in names)
