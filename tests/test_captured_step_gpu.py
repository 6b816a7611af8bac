"""CUDA graphs of a step train as the step itself does, and faster.

pytest -s tests/test_captured_step_gpu.py     # prints the ratio of their speeds
"""

import subprocess
import sys
import time
from itertools import cycle, islice

import pytest
import torch
from conftest import ROOT, arguments, read, short_fields
from packed_training import FOUR_BITS, build, train
from tiny_base import byte_tokenizer, write_jsonl
from transformers import LlamaConfig, LlamaForCausalLM

from sftlab.config.launch import exported
from sftlab.fastpath import captured_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU replays CUDA graphs")
STEPS = 20
CHECKPOINTED = {"gradient_checkpointing": "true", "lora_dropout": "0"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Folder of a random Llama of eight layers, whose kernels are far shorter than their starts."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=256, intermediate_size=512, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
        bos_token_id=256, eos_token_id=257, pad_token_id=258, initializer_range=0.05,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def fields(small, tmp_path, monkeypatch):
    """A run of 20 steps of two micro-batches, under single.yaml: rows of 70 to 250 tokens."""
    monkeypatch.setattr(captured_step, "RECORDED_WHEN_MET", 1)
    for name, value in exported(ROOT / "accelerate_configs" / "single.yaml").items():
        monkeypatch.setenv(name, value)
    rows = [
        {
            "instruction": "Repeat." * (1 + i * 7 % 12),
            "response": f"It is {i}" + "!" * (i * 37 % 131),
        }
        for i in range(400)
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    return short_fields(small, path, tmp_path / "run") | {
        "max_steps": str(STEPS),
        "max_length": "256",
        "global_batch_size": "16",
        "per_device_train_batch_size": "8",
        "gradient_checkpointing": "false",
        "learning_rate": "0.001",
        "lora_r": "8",
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": "8",
    }


def trained(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


def losses(trainer, **kwargs) -> list[float]:
    found = [entry["loss"] for entry in train(trainer, **kwargs)]
    if trainer.capture is not None:
        assert trainer.fast.captured_step, trainer.fast.reasons
    return found


def seconds_a_micro_batch(trainer, count: int = 30) -> float:
    """Of forward and backward, over batches of several sizes."""
    batches = list(islice(trainer.get_train_dataloader(), 6))
    tokens = torch.tensor(400, device="cuda")
    for timed in (False, True):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for batch in islice(cycle(batches), count):
            trainer.forward_and_backward(trainer.model_wrapped, batch, tokens)
            trainer.model_wrapped.zero_grad()
        torch.cuda.synchronize()
        if timed:
            return (time.perf_counter() - began) / count
    raise AssertionError("unreachable")


def test_replayed_steps_train_as_compiled_ones_and_faster(fields, tmp_path):
    torch._dynamo.reset()
    plain = build(fields, lora_dropout="0", output_dir=tmp_path / "plain")
    assert plain.fast.packing and plain.fast.compile_layers
    expected = losses(plain)
    mine = build(fields, lora_dropout="0", captured_step="true", output_dir=tmp_path / "mine")
    found = losses(mine)
    apart = max(abs(one - other) / one for one, other in zip(expected, found, strict=True))
    print(f"\nlosses of the plain steps are within {apart:.2e}")
    assert apart < 0.02, "products of other sizes round otherwise"
    facts = mine.capture.facts()
    assert facts["recordings"] > 2 and facts["plain_micro_batches"] == 0
    assert torch.cosine_similarity(trained(plain), trained(mine), dim=0) > 0.99
    held_out = [
        [e["eval_loss"] for e in one.state.log_history if "eval_loss" in e] for one in (plain, mine)
    ]
    assert held_out[1] == pytest.approx(held_out[0], rel=2e-2) and len(held_out[0]) == 3
    ratio = seconds_a_micro_batch(plain) / seconds_a_micro_batch(mine)
    print(f"\n{facts}; a replayed micro-batch is {ratio:.2f} times as fast as a plain one")
    assert ratio > 1


def test_dropout_is_that_of_plain_steps_and_of_a_run_that_goes_on(fields, tmp_path, monkeypatch):
    torch._dynamo.reset()
    more = {"lora_dropout": "0.05", "captured_step": "true"}
    monkeypatch.setattr(captured_step, "MOST_SHAPES", 0)
    plain = build(fields, **more, output_dir=tmp_path / "plain")
    expected = losses(plain)
    monkeypatch.setattr(captured_step, "MOST_SHAPES", 64)
    saved = {"save_strategy": "steps", "save_steps": "8", "save_total_limit": "9"}
    mine = build(fields | saved, **more)
    found = losses(mine)
    apart = max(abs(one - other) / one for one, other in zip(expected, found, strict=True))
    print(f"\nplain steps of the same batches have losses within {apart:.2e}")
    assert found == pytest.approx(expected, rel=1e-3)
    again = build(fields | saved, **more, overwrite="true")
    checkpoint = f"{fields['output_dir']}/checkpoint-8"
    assert losses(again, resume_from_checkpoint=checkpoint) == found
    assert torch.equal(trained(mine), trained(again))


@pytest.mark.parametrize(
    "more",
    [
        {"fused_lora": "true", "lora_dropout": "0.05"},
        {**FOUR_BITS, "lora_dropout": "0.05"},
        {**FOUR_BITS, "lora_dropout": "0.05", "precision": "fp8", "compile_layers": "true"},
        {**CHECKPOINTED, "compile_layers": "true"},
        {**CHECKPOINTED, "compile_layers": "true", "fused_lora": "true"},
        {**CHECKPOINTED, **FOUR_BITS},
    ],
    ids=[
        "fused LoRA",
        "4 bits",
        "4 bits in fp8",
        "checkpointed",
        "checkpointed, fused LoRA",
        "checkpointed, 4 bits",
    ],
)
def test_other_parts_of_the_fast_path_are_recorded_too(fields, tmp_path, monkeypatch, more):
    if "load_in_4bit" in more:
        pytest.importorskip("bitsandbytes")
    torch._dynamo.reset()
    more = dict(more)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", more.pop("precision", "bf16"))
    more = {"max_steps": "6", "captured_step": "true", "compile_layers": "false"} | more
    runs = []
    for shapes in (0, 64):
        monkeypatch.setattr(captured_step, "MOST_SHAPES", shapes)
        runs.append(losses(build(fields, **more, output_dir=tmp_path / str(shapes))))
    assert runs[1] == pytest.approx(runs[0], rel=1e-3)
    if "gradient_checkpointing" not in more:
        return
    plain = losses(
        build(fields, **more | {"captured_step": "false"}, output_dir=tmp_path / "plain")
    )
    apart = max(abs(one - other) / one for one, other in zip(plain, runs[1], strict=True))
    print(f"\nlosses of plain steps, checkpointed too, are within {apart:.2e}")
    assert apart < 0.02, "products of other sizes round otherwise"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs average their gradients")
def test_processes_that_record_train_as_ddp(fields, tmp_path, monkeypatch):
    """On all GPUs, launched as a user does."""
    for name in exported(ROOT / "accelerate_configs" / "single.yaml"):
        monkeypatch.delenv(name)
    count = torch.cuda.device_count()
    fields |= {
        "max_steps": "8",
        "global_batch_size": str(8 * count),
        "per_device_train_batch_size": "4",
        "lora_dropout": "0",
        "eval_strategy": "no",
    }
    runs = []
    for switch in ("false", "true"):
        asked = fields | {"captured_step": switch, "output_dir": str(tmp_path / switch)}
        config = str(ROOT / "accelerate_configs" / "ddp.yaml")
        words = ["recipes/sft.py", "--config_file", config, "--num_processes", str(count)]
        command = [sys.executable, *words, *arguments(asked)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        runs.append(read(tmp_path / switch))
    for run in runs:
        assert (run["ran"]["strategy"], run["ran"]["world_size"]) == ("ddp", count)
        assert run["ran"]["accumulation"] == 2 and run["ran"]["compile_layers"]
    plain, mine = ([loss for _, loss in run["losses"]] for run in runs)
    facts = runs[1]["measured"]["captured_step"]
    assert runs[1]["ran"]["captured_step"] and facts["recordings"] > 0, facts
    apart = max(abs(one - other) / one for one, other in zip(plain, mine, strict=True))
    print(f"\n{count} processes: {facts}; losses of plain DDP are within {apart:.2e}")
    assert apart < 0.02 and len(mine) == 8, "products of other sizes round otherwise"
