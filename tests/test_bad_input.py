"""Input that is refused at once: one sentence, a non-zero exit, and no model loaded."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import arguments, read
from transformers import SmolVLMConfig

BAD_INPUT = [
    (
        {"lora_target_modules": "query"},
        {},
        "it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
    ),
    ({"dataset_name": "nowhere.jsonl"}, {}, "data file nowhere.jsonl not found"),
    ({"model_name_or_path": "data/nowhere"}, {}, "base model data/nowhere not found"),
    ({"model_name_or_path": "nobody/nothing"}, {}, "hf auth login"),
    ({"chat_template_path": "nowhere.jinja"}, {}, "chat_template_path nowhere.jinja not found"),
    ({"lora_r": "0"}, {}, "lora_r is 0"),
    ({"eos_token": "<end>"}, {}, "eos_token '<end>' is not in the vocabulary"),
    ({}, {"ACCELERATE_MIXED_PRECISION": "fp16"}, "fp16 does not run on a CPU"),
    ({}, {"ACCELERATE_MIXED_PRECISION": "fp8"}, "fp8 does not run on a CPU"),
    ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP needs GPUs"),
    ({}, {"ACCELERATE_MIXED_PRECISION": "bf16", "CUDA_VISIBLE_DEVICES": ""}, "shows none"),
]


def test_pickled_weights_are_refused(sft, fields, base, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    copy = shutil.copytree(
        base, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors")
    )
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(SystemExit, match=r"holds no \.safetensors file"):
        sft.main(arguments(fields | {"model_name_or_path": str(copy)}))


def test_a_model_of_images_is_refused(sft, fields, base, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    copy = shutil.copytree(base, tmp_path / "sees")
    SmolVLMConfig().save_pretrained(copy)
    with pytest.raises(SystemExit, match="SmolVLMForConditionalGeneration has no text model"):
        sft.main(arguments(fields | {"model_name_or_path": str(copy)}))


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="on a GPU machine these launches are right or differently wrong",
)
@pytest.mark.parametrize(("change", "environment", "message"), BAD_INPUT)
def test_bad_input_is_one_sentence_before_any_model_is_loaded(
    sft, fields, monkeypatch, change, environment, message
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sft, "build_trainer", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setattr(sft, "use_all_cpu_cores", lambda launch: None)
    with pytest.raises(SystemExit) as caught:
        sft.main(arguments(fields | change))
    text = str(caught.value.code)
    assert text.startswith("error: ")
    assert message in text
    assert "\n" not in text
    if (Path(fields["output_dir"]) / "run.json").is_file():
        assert read(fields["output_dir"])["status"] == "failed"
        assert message in read(fields["output_dir"])["reason"]
