"""Settings on the command line reach the training: processes, precision, layers, streams."""

import shutil
import time

import pytest
import torch
from conftest import (
    SHARED,
    launched,
    needs_shared,
    read,
)
from test_sft import losses
from transformers import GPT2Config, GPT2LMHeadModel


def test_gpt2s_layers_are_adapted_and_checked(fields, base, tmp_path, trained_here):
    ids = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    gpt2 = shutil.copytree(base, tmp_path / "gpt2", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=2, n_positions=512, **ids)
    ).save_pretrained(gpt2)
    trained_here(fields | {"model_name_or_path": str(gpt2), "lora_target_modules": "c_attn"})
    run = read(fields["output_dir"])
    assert run["ran"]["compute"] == {"linear": "Conv1D", "output_dtype": "float32"}
    assert run["ran"]["trainable_parameters"] == 2 * 16 * (32 + 96)
    assert losses(fields["output_dir"])[6] < losses(fields["output_dir"])[1] - 0.05


@pytest.mark.long
def test_num_processes_on_the_command_line_really_starts_them(finished, tmp_path):
    _, fields, _ = finished
    launched(
        "cpu",
        {**fields, "output_dir": str(tmp_path / "run"), "max_steps": "2"},
        ("--num_processes", "2"),
    )
    assert read(tmp_path / "run")["ran"]["strategy"] == "ddp"


def test_mixed_precision_on_the_command_line_really_runs(finished, tmp_path):
    _, fields, _ = finished
    launched(
        "cpu",
        {**fields, "output_dir": str(tmp_path / "run"), "max_steps": "2"},
        ("--mixed_precision", "bf16"),
    )
    ran = read(tmp_path / "run")["ran"]
    assert ran["precision"] == "bf16"
    assert ran["compute"]["output_dtype"] == "bfloat16"
    assert ran["frozen_dtypes"] == ["bfloat16"]
    assert ran["trainable_dtypes"] == ["float32"]


def test_a_one_layer_cut_trains_from_a_stream(finished, tmp_path, trained_here):
    _, fields, _ = finished
    own = {
        **fields,
        "output_dir": str(tmp_path / "run"),
        "max_steps": "3",
        "dataset_streaming": "true",
        "streaming_eval_rows": "10",
        "model_init_kwargs": '{"num_hidden_layers": 1}',
    }
    trained_here(own)
    record = read(tmp_path / "run")
    assert record["ran"]["trainable_parameters"] == 16 * ((32 + 32) + (32 + 16) + (32 + 32))
    assert record["data"]["streaming"] is True
    (trained,) = record["measured"]["trained_on"]
    assert trained["dataset"] == own["dataset_name"]
    assert trained["sequences"] == 3 * record["ran"]["global_batch"] < trained["tokens"]


@pytest.mark.long
@needs_shared
def test_real_data_train_alike_on_one_and_two_processes(finished, tmp_path):
    _, fields, _ = finished
    own = {
        **fields,
        "dataset_name": str(SHARED / "alpaca_en_1k.json"),
        "lora_dropout": "0",
        "save_strategy": "no",
    }
    own |= {"max_steps": "60", "global_batch_size": "16", "max_length": "256"}
    for config in ("cpu", "cpu_ddp"):
        launched(config, {**own, "output_dir": str(tmp_path / config)})
    one, two = losses(tmp_path / "cpu"), losses(tmp_path / "cpu_ddp")
    assert max(abs(one[s] - two[s]) for s in range(1, 61)) < 1e-3
    started = time.time()
    launched(
        "cpu",
        {
            **own,
            "dataset_name": str(SHARED / "gsm8k_train.jsonl"),
            "output_dir": str(tmp_path / "gsm8k"),
        },
    )
    assert read(tmp_path / "gsm8k")["data"]["shape"] == "gsm8k"
    assert time.time() - started < 200
