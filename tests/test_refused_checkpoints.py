"""Checkpoints that are quantised, or no causal language models: one sentence, in run and plan."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import arguments, load_script, read
from safetensors.torch import load_file, save_file
from tiny_base import write_base_of
from transformers import AutoConfig, AutoModelForCausalLM

from sftlab.evaluation.base_and_tuned import load_pair
from sftlab.models.loading import load_weights

SIZES = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SEQ2SEQ = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 259}
ENCODERS = {
    "t5": ({"d_model": 32, "num_layers": 1, "num_heads": 2}, "an encoder-decoder"),
    "bart": (SEQ2SEQ, "an encoder-decoder"),
    "whisper": (SEQ2SEQ, "an encoder-decoder"),
    "modernbert": (SIZES, "an encoder"),
    "bert": (SIZES, "an encoder"),
    "clip_text_model": (SIZES, "no causal class"),
}
METHODS = ["fp8", "awq", "gptq", "compressed-tensors", "bitsandbytes", "torchao", "mxfp4"]
# the numbers of MXFP4, by their codes
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FP4 = torch.cat([FP4, -FP4])


def copy_with(base, folder, **changes):
    """A copy of the base model whose config.json has other values."""
    shutil.copytree(base, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def refusals(sft, fields, folder, monkeypatch):
    """What the run and the plan say of a base model, each in one sentence."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setattr(sft, "build_trainer", lambda *a, **k: pytest.fail("a model was loaded"))
    given = arguments(fields | {"model_name_or_path": str(folder)})
    with pytest.raises(SystemExit) as run:
        sft.main(given)
    with pytest.raises(SystemExit) as plan:
        load_script("recipes/plan.py").main([*given, "--gpu", "h100-80"])
    return str(run.value), str(plan.value)


@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_checkpoint_is_refused(method, sft, fields, base, tmp_path, monkeypatch):
    folder = copy_with(base, tmp_path / "copy", quantization_config={"quant_method": method})
    for said in refusals(sft, fields, folder, monkeypatch):
        assert f"already quantised (config.json says {method}): give its checkpoint in 16" in said


def test_quantised_tensors_are_refused_where_the_config_is_silent(base, tmp_path):
    folder = copy_with(base, tmp_path / "copy")
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    weights[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"already quantised \(it holds {name}_scale_inv\)"):
        load_weights(str(folder), {"trust_remote_code": False, "dtype": "float32"}, None, None)


def in_mxfp4(folder):
    """Write a gpt-oss with experts in MXFP4, as it is published. Returns folder and experts."""
    base = write_base_of("gpt_oss", folder, head_dim=16, num_local_experts=4)
    weights, experts = load_file(base / "model.safetensors"), {}
    for name in [
        one for one in weights if one.endswith(("experts.gate_up_proj", "experts.down_proj"))
    ]:
        count, inputs, outputs = weights.pop(name).shape
        codes = torch.randint(0, 16, (count, outputs, inputs // 32, 32))
        scales = torch.randint(118, 122, (count, outputs, inputs // 32))
        blocks = FP4[codes] * 2.0 ** (scales[..., None] - 127)
        experts[name] = blocks.reshape(count, outputs, inputs).transpose(1, 2)
        weights[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
        weights[f"{name}_scales"] = scales.to(torch.uint8)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    copy_with(base, folder / "mxfp4", quantization_config={"quant_method": "mxfp4"})
    return folder / "mxfp4", experts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_experts_of_gpt_oss_are_those_that_were_published(dtype, tmp_path):
    folder, experts = in_mxfp4(tmp_path)
    model = load_weights(str(folder), {"trust_remote_code": False, "dtype": dtype}, None, None)
    found = model.state_dict()
    assert experts and all(torch.equal(found[name].float(), experts[name]) for name in experts)
    assert {one.dtype for one in model.parameters()} == {getattr(torch, dtype)}
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()


def test_a_run_on_the_published_gpt_oss(fields, tmp_path, trained_here):
    folder, _ = in_mxfp4(tmp_path)
    fields |= {"model_name_or_path": str(folder), "max_steps": "1", "lora_target_modules": "q_proj"}
    trained_here(fields)
    load_script("recipes/plan.py").main([*arguments(fields), "--gpu", "h100-80"])
    assert load_pair(Path(fields["output_dir"]), read(fields["output_dir"])) is not None


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_is_refused(kind, sft, fields, base, tmp_path, monkeypatch):
    settings, what = ENCODERS[kind]
    folder = copy_with(base, tmp_path / "copy")
    AutoConfig.for_model(kind, **settings).save_pretrained(folder)
    for said in refusals(sft, fields, folder, monkeypatch):
        assert "is no causal language model: " in said and what in said
        assert "compare it with" not in said


def test_a_decoder_of_an_encoders_family_is_loaded(tmp_path):
    config = AutoConfig.for_model("bert", **SIZES, is_decoder=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    kwargs = {"trust_remote_code": False, "dtype": "float32"}
    assert type(load_weights(str(tmp_path), kwargs, None, None)).__name__ == "BertLMHeadModel"


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification"])
def test_a_classifier_is_refused(task, sft, fields, base, tmp_path, monkeypatch):
    folder = copy_with(base, tmp_path / task, architectures=[f"LlamaFor{task}"])
    for said in refusals(sft, fields, folder, monkeypatch):
        assert f"is no causal language model: config.json says LlamaFor{task}, whose head" in said
