"""Where steps are captured by themselves, and how a run that began so goes on."""

from copy import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import arguments, read, short_fields
from packed_training import (
    assert_checkpoints_say,
    build,
    pack_on_a_cpu,
    reference_attention,
    stop_in_step_two,
    train,
)
from planned_steps import forecast
from step_tape import Tape
from transformers import LlamaConfig

from sftlab.config.launch import Launch, exported, launched
from sftlab.config.parser import parse_recipe
from sftlab.config.recipe import ModelArguments
from sftlab.fastpath import varlen_attention
from sftlab.fastpath.captured_step import CapturedSteps, NotCaptured, StaticGradients
from sftlab.fastpath.selection import choose
from sftlab.models.random_models import MODEL_SHAPES
from sftlab.paths import ROOT
from sftlab.planning.plan import captures_by_itself, resized
from sftlab.runs.run_directory import adapter_hash
from sftlab.training import step_capture

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QLORA = {
    "shape": "llama2-7b",
    "load_in_4bit": "true",
    "bnb_4bit_quant_storage": "bfloat16",
    "targets": ALL,
    "lora_r": 32,
}


def captured(**asked) -> bool:
    return forecast(**{"lora_dropout": 0} | asked).time.captured


def rows(count, **more):
    return {"per_device_train_batch_size": count, "global_batch_size": count} | more


@pytest.mark.parametrize(
    "asked",
    [
        rows(20, targets=ALL),
        rows(4),
        rows(4, **QLORA),
        rows(4, max_steps=500, **QLORA),
        rows(11, **QLORA),
        rows(20, launch="fp8"),
        rows(11, launch="fp8", **QLORA),
        rows(4, gradient_checkpointing="true", **QLORA),
        rows(20, targets=ALL, launch="ddp", flags={"num_processes": 2}, global_batch_size=40),
    ],
    ids=str,
)
def test_small_micro_batches_are_captured(asked):
    assert captured(**asked)


@pytest.mark.parametrize(
    "asked",
    [
        rows(64),
        rows(64, targets=ALL),
        rows(42, **QLORA),
        rows(20, targets=ALL, gpu="a10"),  # it needs longer for its work, and never waits
        rows(4, captured_step="false"),
        rows(4, compile_layers="false"),
        rows(4, packing="false"),
        rows(4, launch="fp16"),
        rows(4, launch="fp32"),  # its products keep the GPU busy
        rows(4, use_peft="false"),
        rows(4, gpu="l4", **QLORA),  # too little memory is left
        rows(64, launch="fp8"),
        rows(64, targets=ALL, launch="fp8"),
        rows(42, launch="fp8", **QLORA),
        rows(20, targets=ALL, max_steps=500),  # capturing some 40 sizes would cost more
        rows(20, launch="fsdp", flags={"num_processes": 2}, global_batch_size=40),
        rows(4, gradient_checkpointing="true", lora_dropout=0.05),  # its masks are drawn twice
    ],
    ids=str,
)
def test_others_are_not(asked):
    assert not captured(**asked)


def test_preference_tuning_captures_nothing(monkeypatch):
    monkeypatch.setattr(varlen_attention, "why_not", lambda layers, longest: None)
    with launched(exported(ROOT / "accelerate_configs" / "single.yaml")) as launch:
        config = str(ROOT / "recipes" / "llama3.2-1b-dpo" / "attn_r16.yaml")
        recipe = parse_recipe(["--config", config, "--compile_layers", "true"], launch)
        fast = choose(recipe, LlamaConfig(**MODEL_SHAPES["llama3.2-1b"]), launch, lambda: None)
    assert fast.packing and fast.compile_layers and not fast.may_capture_step


def test_what_is_asked_for_is_captured_whatever_its_size():
    assert captured(**rows(64, captured_step="true"))


def test_a_smaller_micro_batch_than_one_that_leaves_no_memory_is_captured():
    large = forecast(gpu="l4", lora_dropout=0, **rows(24, **QLORA))
    assert not large.time.captured and resized(large, 1).time.captured


def test_a_captured_step_does_not_wait_for_the_host():
    asked = rows(4, **QLORA)
    plain = forecast(lora_dropout=0, captured_step="false", **asked)
    alone = forecast(lora_dropout=0, **asked)
    assert plain.time.bound == "host" and alone.time.bound == "GPU"
    assert plain.time.gpu < alone.time.gpu < 1.05 * plain.time.gpu


# ---- the training ----


@pytest.fixture
def fields(base, rows, tmp_path, monkeypatch) -> dict[str, str]:
    """A run of packed rows on a CPU, whose steps a tape can capture."""
    pack_on_a_cpu(monkeypatch, reference_attention)
    monkeypatch.setattr(step_capture, "CudaGraphs", type("Tape", (Tape,), {}))
    return short_fields(base, rows, tmp_path / "run") | {"lora_dropout": "0"}


@pytest.mark.parametrize(
    ("name", "asked", "captures"),
    [
        ("NVIDIA H200", True, True),
        ("NVIDIA H200", False, False),
        ("NVIDIA H300", True, False),
    ],
)
def test_a_training_of_small_batches_captures_them_on_a_gpu_of_the_table(
    fields, monkeypatch, name, asked, captures
):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    made = build(fields)
    assert not made.fast.may_capture_step, "layers are not compiled on a CPU"
    made.fast.may_capture_step = asked
    long = copy(made.args)
    long.max_steps = 1000
    recipe = SimpleNamespace(model=model_of(fields), training=long)
    assert captures_by_itself(recipe, made.launch, made.fast, made) is captures


def model_of(fields) -> ModelArguments:
    return parse_recipe(arguments(fields), Launch.from_environment()).model


def choosing(sft, monkeypatch, captures: bool) -> None:
    """Let the script capture steps by itself, or not."""

    def possible(*given):
        fast = choose(*given)
        fast.may_capture_step = not fast.captured_step
        return fast

    monkeypatch.setattr(sft, "choose", possible)
    monkeypatch.setattr(
        sft, "captures_by_itself", lambda r, la, fast, t: captures and fast.may_capture_step
    )


@pytest.mark.parametrize(
    "began",
    [pytest.param("before this default", marks=pytest.mark.long), "with"]
    + [pytest.param("without", marks=pytest.mark.long)],
)
def test_a_run_goes_on_as_it_began(
    fields, sft, tmp_path, monkeypatch, train_here, trained_here, began
):
    captures = began == "with"
    with monkeypatch.context() as patched:
        choosing(sft, patched, captures)
        stop_in_step_two(patched)
        done = train_here(fields)
        assert read(tmp_path / "run")["status"] == "interrupted", done.stderr[-2000:]
    before = began == "before this default"
    assert_checkpoints_say(tmp_path / "run", "captured_step", captures, forget=before)
    with monkeypatch.context() as patched:
        choosing(sft, patched, not captures)
        trained_here(fields)
    choosing(sft, monkeypatch, captures)
    trained_here(fields | {"output_dir": str(tmp_path / "whole")})
    run, whole = read(tmp_path / "run"), read(tmp_path / "whole")
    assert run["ran"]["captured_step"] is whole["ran"]["captured_step"] is captures
    assert ("recordings" in run["measured"].get("captured_step", {})) is captures
    assert run["losses"] == whole["losses"]
    assert adapter_hash(tmp_path / "run") == adapter_hash(tmp_path / "whole")


def test_a_run_that_cannot_go_on_so_is_refused(
    fields, sft, tmp_path, monkeypatch, train_here, trained_here
):
    with monkeypatch.context() as patched:
        choosing(sft, patched, True)
        stop_in_step_two(patched)
        train_here(fields)
    done = train_here(fields)
    assert done.returncode, "layers are not compiled here"
    assert "the run began with captured steps, which are not possible here" in done.stderr
    trained_here(fields | {"resume_anyway": "true"})
    assert read(tmp_path / "run")["ran"]["captured_step"] is False


class OneFits(Tape):
    """A recorder whose memory is short once it holds a recording."""

    held = 0

    def record(self, work):
        type(self).held += 1
        return super().record(work)

    def forget(self, drop):
        type(self).held = 0
        super().forget(drop)

    def short_of_memory(self) -> bool:
        return self.held > 0


def test_recordings_and_an_evaluation_share_what_memory_there_is(fields, tmp_path, monkeypatch):
    more = {"captured_step": "true", "eval_strategy": "steps", "eval_steps": 2}
    losses = []
    for recorder in (Tape, OneFits):
        tape = type("Tape", (recorder,), {})
        monkeypatch.setattr(step_capture, "CudaGraphs", tape)
        trainer = build(fields, output_dir=tmp_path / recorder.__name__, **more)
        losses.append([entry["loss"] for entry in train(trainer) if "loss" in entry])
        assert trainer.capture.facts()["recordings"] == tape.recorded
        assert tape.forgotten == (3 if recorder is OneFits else 0)
        assert trainer.fast.captured_step
    assert losses[0] == losses[1]


def test_a_size_is_captured_when_it_comes_again():
    weight, tape = torch.nn.Parameter(torch.ones(3)), type("Tape", (Tape,), {})()
    steps = CapturedSteps(multiplied_by(weight), StaticGradients([weight]), tape)
    met, plain = [], []
    for size in (1, 2, 3, 2, 3, 1, 4):
        assert steps.run({"x": torch.full((size,), 2.0)})[0] == 6.0 * size
        met.append(steps.captures)
        plain.append(steps.plain)
    assert met == [1, 1, 1, 2, 3, 3, 3]
    assert plain == [0, 1, 2, 2, 2, 2, 3]
    assert weight.grad.tolist() == [2.0 * (1 + 2 + 3 + 2 + 3 + 1 + 4)] * 3


def test_without_room_for_one_recording_there_is_none():
    weight, tape = torch.nn.Parameter(torch.ones(3)), type("Tape", (Tape,), {"short": True})()
    steps = CapturedSteps(multiplied_by(weight), StaticGradients([weight]), tape)
    with pytest.raises(NotCaptured, match="too little of the GPU's memory is left"):
        steps.run({"x": torch.ones(2)})
    assert not tape.recorded


def multiplied_by(weight):
    def step(batch):
        loss = (batch["x"][:, None] * weight).sum()
        loss.backward()
        return loss.detach().reshape(1)

    return step
