"""Shapes of other families: their published sizes, and that a benchmark's worker trains them."""

import json

import pytest
import torch
from conftest import load_script
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from sftlab.measurement.throughput_variants import FAMILY_OF
from sftlab.measurement.turnstile import Turnstile
from sftlab.models import random_models
from sftlab.models.family_shapes import FAMILY_SHAPES
from sftlab.models.random_models import make_random_files, random_files, shape_config

# billions of parameters, and the layers of the published model where the shape has fewer
PUBLISHED = {
    "llama3-8b": (8.03, None),
    "qwen3-1.7b": (1.72, None),
    "gemma3-1b": (1.00, None),
    "olmo3-1.5b": (1.485, None),  # OLMo-2-1B's
    "phi4-mini": (3.84, None),
    "qwen3.5-2b": (1.88, None),  # without the part for images
    "qwen3-30b-a3b-6-layers": (30.5, 48),
    "gpt-oss-20b-4-layers": (20.9, 24),
}
SMALL = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SMALL_PARTS = {
    "sliding_window": 32,
    "moe_intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}


@pytest.mark.parametrize("shape", PUBLISHED)
def test_a_shape_has_the_published_number_of_parameters(shape):
    billions, layers = PUBLISHED[shape]
    config = shape_config(shape)
    if layers:
        config = type(config)(**FAMILY_SHAPES[shape][1] | {"num_hidden_layers": layers})
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted / 1e9 == pytest.approx(billions, rel=0.02)
    targets = FAMILY_OF[shape].targets if shape in FAMILY_OF else []
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    assert set(targets) <= names


@pytest.mark.parametrize("shape", FAMILY_SHAPES)
def test_a_worker_trains_a_small_model_of_the_family(monkeypatch, tmp_path, shape):
    model_type, fields = FAMILY_SHAPES[shape]
    small = fields | SMALL | {name: SMALL_PARTS[name] for name in SMALL_PARTS if name in fields}
    if model_type == "phi3":  # it computes the size of its heads
        del small["head_dim"]
    monkeypatch.setitem(FAMILY_SHAPES, "small", (model_type, small))
    monkeypatch.setattr(random_models, "ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    make_random_files("small", 64, 40)
    base, rows = random_files("small", 64)
    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.config.model_type == model_type and model.dtype == torch.bfloat16
    assert all(torch.isfinite(p).all() for p in model.parameters())

    worker = load_script("benchmarks/throughput_worker.py")
    turnstile = Turnstile(tmp_path, turns=1, warm=1, steps=2)
    (tmp_path / "go0").touch()
    fields = {"per_device_train_batch_size": 2, "max_length": 64, "bf16": False}
    fields |= {"lora": {"target_modules": FAMILY_OF[shape].targets}, "dtype": "float32"}
    worker.train_trl(fields, str(base), str(rows), turnstile.total, turnstile, tmp_path)
    report = json.loads((tmp_path / "done0").read_text(encoding="utf-8"))
    assert report["tokens_per_s"] > 0 and report["model_flops_per_s"] > 0
    assert ("experts: " in report["parts"]) is ("num_local_experts" in small)
