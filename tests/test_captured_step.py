"""Recorded steps train as plain ones do, whatever their batches hold.

On a CPU a tape of operations stands in for CUDA graphs (tests/step_tape.py): what is baked into a
recording shows. tests/test_captured_step_gpu.py has the graphs themselves.
"""

import dataclasses

import pytest
import torch
from conftest import arguments, short_fields
from packed_training import (
    FOUR_BITS,
    build,
    examples,
    pack_on_a_cpu,
    reference_attention,
    train,
    with_trained_lora,
)
from step_tape import Tape
from tiny_base import write_jsonl
from torch import nn
from transformers import Lfm2Config, LlamaConfig

from sftlab.config.launch import Launch
from sftlab.config.parser import parse_recipe
from sftlab.data.collator import Collator
from sftlab.fastpath import captured_step, selection
from sftlab.fastpath.captured_step import NotCaptured, StaticGradients
from sftlab.measurement.memory import MemorySplit
from sftlab.training import step_capture


@pytest.fixture
def tape(monkeypatch) -> type[Tape]:
    """Let rows be packed and steps be recorded here, each size when it first comes."""
    monkeypatch.setattr(captured_step, "RECORDED_WHEN_MET", 1)
    pack_on_a_cpu(monkeypatch, reference_attention)
    fresh = type("Tape", (Tape,), {})
    monkeypatch.setattr(step_capture, "CudaGraphs", fresh)
    return fresh


@pytest.fixture
def fields(base, tmp_path) -> dict[str, str]:
    """A run over rows of 70 to 250 tokens, of which 10 to 140 are in the loss."""
    rows = [
        {
            "instruction": "Repeat." * (1 + i * 7 % 12),
            "response": f"It is {i}" + "!" * (i * 37 % 131),
        }
        for i in range(120)
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    return short_fields(base, path, tmp_path / "run") | {
        "global_batch_size": "4",
        "per_device_train_batch_size": "4",
        "max_length": "256",
        "save_strategy": "no",
        "lora_dropout": "0",
        "packing": "true",
        "gradient_checkpointing": "false",
    }


def weights(trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]


@pytest.mark.parametrize("count", [1, 44])
def test_filling_up_changes_neither_loss_nor_gradients(fields, tape, count):
    trainer, given = with_trained_lora(build(fields)), examples(count)
    found = []
    for parts in (0, 8):
        wide = {"multiple": 384} if parts else {}  # short rows would not be filled up else
        pad = trainer.processing_class.pad_token_id
        batch = Collator(pad, packed=True, parts=parts, **wide)(given)
        trainer.model.zero_grad()
        loss, sums = trainer.loss_and_sums(trainer.model.train(), batch, torch.tensor(77))
        loss.backward()
        gradients = [p.grad.clone() for p in trainer.model.parameters() if p.requires_grad]
        found.append((batch["input_ids"].numel(), loss, sums, gradients))
    (size, *plain), (filled, *mine) = found
    assert filled > size
    for one, other in zip([*plain[:2], *plain[2]], [*mine[:2], *mine[2]], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-7)


# ---- the training ----


@pytest.mark.parametrize(
    "more",
    [
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 2, "eval_strategy": "steps", "eval_steps": 2},
        {"per_device_train_batch_size": 1, "lora_target_modules": ["q_proj", "down_proj"]},
        {"per_device_train_batch_size": 2, "fused_lora": "true"},
        {"per_device_train_batch_size": 2, "gradient_checkpointing": "true"},
    ],
    ids=["no accumulation", "evaluated", "single rows", "fused LoRA", "checkpointed"],
)
def test_replayed_steps_train_as_plain_ones(fields, tape, tmp_path, more):
    targets = more.pop("lora_target_modules", None)
    if targets:
        fields["lora_target_modules"] = targets
    runs = {}
    for name, switch in (("plain", "false"), ("replayed", "true")):
        trainer = build(fields, captured_step=switch, output_dir=tmp_path / name, **more)
        runs[name] = trainer, train(trainer)
        runs[f"{name} held out"] = [
            e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e
        ]
    (plain, expected), (mine, found) = runs["plain"], runs["replayed"]
    assert mine.fast.captured_step and not plain.fast.captured_step
    assert mine.args.gradient_checkpointing == ("gradient_checkpointing" in more)
    micro_batches = 6 * 4 // more["per_device_train_batch_size"]
    # the first one is compared, and so is one for each recording
    assert tape.replayed == micro_batches + 1 + tape.recorded
    assert 3 <= tape.recorded <= micro_batches
    assert tape.recorded < micro_batches or "eval_steps" not in more, "shapes come again"
    assert mine.capture.facts() == {"recordings": tape.recorded, "plain_micro_batches": 0}
    for one, other in zip(expected, found, strict=True):
        for key in ("loss", "grad_norm", "num_tokens", "entropy", "mean_token_accuracy"):
            assert other[key] == pytest.approx(one[key], rel=1e-5, abs=1e-6), key
    assert runs["replayed held out"] == pytest.approx(runs["plain held out"], abs=1e-6)
    for one, other in zip(weights(plain), weights(mine), strict=True):
        torch.testing.assert_close(other, one, atol=2e-5, rtol=1e-4)


def test_dropout_does_not_depend_on_which_sizes_are_recorded(fields, tape, tmp_path, monkeypatch):
    more = {"captured_step": "true", "lora_dropout": 0.2, "per_device_train_batch_size": 2}
    found = []
    for shapes in (64, 2, 0):
        monkeypatch.setattr(captured_step, "MOST_SHAPES", shapes)
        trainer = build(fields, output_dir=tmp_path / str(shapes), **more)
        losses = [entry["loss"] for entry in train(trainer)]
        found.append((losses, weights(trainer), torch.get_rng_state()))
        assert (trainer.capture.facts()["plain_micro_batches"] > 0) == (shapes < 64)
    for losses, trained, drawn in found[1:]:
        assert losses == found[0][0]
        assert all(map(torch.equal, trained, found[0][1]))
        assert torch.equal(drawn, found[0][2])


@pytest.mark.parametrize("micro_batch", [4, 1])
def test_a_run_that_goes_on_replays_what_it_would_have_replayed(
    fields, tape, tmp_path, micro_batch
):
    more = {
        "captured_step": "true",
        "lora_dropout": 0.1,
        "per_device_train_batch_size": micro_batch,
        "save_strategy": "steps",
    }
    whole = build(fields, **more)
    losses = [entry["loss"] for entry in train(whole)]
    again = build(fields, **more, overwrite="true")
    checkpoint = f"{fields['output_dir']}/checkpoint-3"
    assert [entry["loss"] for entry in train(again, resume_from_checkpoint=checkpoint)] == losses
    assert all(map(torch.equal, weights(whole), weights(again)))
    assert again.fast.captured_step


# ---- where it goes back ----


class Waits(Tape):
    """A recorder that finds what it cannot record, as a graph does."""

    def record(self, work):
        def waiting():
            result = work()
            result.sum().item()
            return result

        return super().record(waiting)


class Forgets(Tape):
    """Replays that leave out the gradients of the last batch."""

    def record(self, work):
        _, result = super().record(work)
        kept = work().clone()
        return lambda: result.copy_(kept), result


class Misreads(Tape):
    """Replays whose loss is another one."""

    def record(self, work):
        replay, result = super().record(work)
        return lambda: (replay(), result[:1].mul_(1.01)), result


@pytest.mark.parametrize(
    "recorder, why",
    [
        (Waits, "operation not permitted when recording"),
        (Forgets, "gradients differ by 100.00% from the step's"),
        (Misreads, "the replayed step's loss is"),
    ],
)
def test_a_run_whose_replays_cannot_be_trusted_trains_plain_steps_and_says_why(
    fields, tape, tmp_path, monkeypatch, caplog, recorder, why
):
    more = {"lora_dropout": 0.1, "per_device_train_batch_size": 2}
    monkeypatch.setattr(captured_step, "MOST_SHAPES", 0)
    right = build(fields, **more, captured_step="true", output_dir=tmp_path / "right")
    expected = [entry["loss"] for entry in train(right)]
    monkeypatch.setattr(captured_step, "MOST_SHAPES", 64)
    monkeypatch.setattr(step_capture, "CudaGraphs", recorder)
    trainer = build(fields, **more, captured_step="true")
    assert [entry["loss"] for entry in train(trainer)] == expected
    assert not trainer.fast.captured_step and why in trainer.fast.reasons["captured_step"]
    assert trainer.capture.facts() == {"off": trainer.fast.reasons["captured_step"]}
    assert why in caplog.text and not trainer.what_ran()["captured_step"]
    assert "zero_grad" not in vars(trainer.model)


def test_a_size_that_cannot_be_recorded_ends_the_replays_and_loses_nothing(
    fields, tape, tmp_path, monkeypatch
):
    class First(tape):
        recorded = 0

        def record(self, work):
            if type(self).recorded == 2:
                raise RuntimeError("out of memory")
            return super().record(work)

    more = {"per_device_train_batch_size": 2, "captured_step": "true", "lora_dropout": 0.1}
    right = build(fields, **more, output_dir=tmp_path / "right")
    expected = [entry["loss"] for entry in train(right)]
    monkeypatch.setattr(step_capture, "CudaGraphs", First)
    trainer = build(fields, **more)
    assert [entry["loss"] for entry in train(trainer)] == expected
    assert trainer.capture.off == "out of memory"
    assert all(map(torch.equal, weights(trainer), weights(right)))


def test_a_trained_tensor_without_a_gradient_is_no_zero(fields, tape):
    trainer = build(fields, captured_step="true")
    layer = trainer.model.get_submodule("base_model.model.model.layers.0")
    layer.register_parameter("left_out", nn.Parameter(torch.ones(3)))
    train(trainer)
    assert "1 of 13 trained tensors get no gradient" in trainer.capture.off
    assert layer.left_out.grad is None and torch.equal(layer.left_out.data, torch.ones(3))


def test_checkpointed_layers_that_draw_random_numbers_are_not_recorded(fields, tape):
    trainer = build(fields, captured_step="true", gradient_checkpointing="true", max_steps=1)
    layer = trainer.model.get_submodule("base_model.model.model.layers.0")
    layer.mlp.register_forward_hook(
        lambda mlp, _, found: nn.functional.dropout(found, 0.1, training=mlp.training)
    )
    train(trainer)
    assert trainer.capture.off == "checkpointed layers draw random numbers" and not tape.recorded
    kept = layer._gradient_checkpointing_func.keywords.get("preserve_rng_state", True)
    assert kept, "plain steps recompute them with the same random numbers"


def test_gradients_stay_where_they_are():
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 5, dtype=torch.float64))]
    parameters[0].grad = torch.full((3,), 2.0)
    gradients = StaticGradients(parameters)
    gradients.attach()
    assert [p.grad.flatten()[0].item() for p in parameters] == [2.0, 0.0]
    places = [p.grad.data_ptr() for p in parameters]
    sum(p.sum() * 3 for p in parameters).backward()
    assert [p.grad.flatten()[0].item() for p in parameters] == [5.0, 3.0]
    kept = gradients.clone()
    gradients.zero()
    assert not any(p.grad.any() for p in parameters)
    gradients.restore(kept)

    def backward() -> torch.Tensor:
        (parameters[0].sum() * 7).backward()
        return torch.tensor(1.0)

    assert gradients.add(backward) == 1
    assert [p.grad.flatten()[0].item() for p in parameters] == [12.0, 3.0]
    parameters[0].grad = None
    gradients.attach()
    assert [p.grad.flatten()[0].item() for p in parameters] == [0.0, 3.0]
    assert [p.grad.data_ptr() for p in parameters] == places
    parameters[1].data = torch.ones(2, 5, dtype=torch.float64)
    with pytest.raises(NotCaptured, match="weights were moved"):
        gradients.attach()


# ---- where it cannot be ----

CHECKPOINTED = {"gradient_checkpointing": "true"}


@pytest.mark.parametrize(
    "more, why",
    [
        ({"packing": "false"}, "rows are not packed"),
        (
            CHECKPOINTED | {"lora_dropout": "0.1"},
            "random numbers of lora_dropout 0.1 a second time",
        ),
        (CHECKPOINTED | {"gradient_checkpointing_kwargs": '{"use_reentrant": true}'}, "reentrant"),
        (CHECKPOINTED | {"gradient_checkpointing_kwargs": '{"debug": false}'}, "reentrant"),
        ({"activation_offloading": "true"}, "offloaded activations"),
        ({"fused_loss": "false"}, "the loss is not fused"),
        ({"label_smoothing_factor": "0.1"}, "label smoothing needs whole logits"),
        ({"torch_compile": "true"}, "torch_compile"),
        ({"torch_empty_cache_steps": "2"}, "torch_empty_cache_steps"),
    ],
)
def test_what_cannot_be_recorded_is_refused(fields, tape, more, why):
    with pytest.raises(ValueError, match="captured_step is not possible here") as refusal:
        build(fields | more, captured_step="true")
    assert why in str(refusal.value)


HYBRID = Lfm2Config(hidden_size=64, num_attention_heads=2, num_hidden_layers=2,
                    layer_types=["conv", "full_attention"])  # fmt: skip
LONG = LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
DROPS = LlamaConfig(hidden_dropout=0.1)


@pytest.mark.parametrize(
    "config, launch, model, why",
    [
        (HYBRID, {}, {}, "layers beside attention"),
        (LONG, {}, {}, "rotary embeddings of kind dynamic"),
        (LlamaConfig(), {"world_size": 2, "strategy": "ddp"}, {}, None),
        (LlamaConfig(), {"world_size": 2, "strategy": "fsdp"}, {}, "FSDP gathers"),
        (LlamaConfig(), {}, CHECKPOINTED, None),
        (DROPS, {}, {}, None),
        (DROPS, {}, CHECKPOINTED, "random numbers of hidden_dropout 0.1 a second time"),
        (LlamaConfig(), {}, {"load_in_8bit": "true"}, "8-bit weights look for outliers"),
        (LlamaConfig(), {}, FOUR_BITS, None),
        (LlamaConfig(), {}, {}, None),
    ],
)
def test_models_and_launches_that_cannot_be_recorded_are_refused(
    fields, tape, config, launch, model, why
):
    recipe = parse_recipe(
        arguments(fields | model | {"captured_step": "true"}), Launch.from_environment()
    )
    started = dataclasses.replace(Launch.from_environment(), **launch)
    if why is None:
        assert selection.choose(recipe, config, started).captured_step
        return
    with pytest.raises(ValueError, match=why):
        selection.choose(recipe, config, started)


def test_a_cpu_has_none_and_nothing_is_recorded_unasked(fields):
    with pytest.raises(ValueError, match="captured_step is not possible here: rows are not packed"):
        build(fields | {"packing": "false"}, captured_step="true")
    trainer = build(fields | {"packing": "false"})
    assert not trainer.fast.captured_step and trainer.capture is None


def test_memory_of_replays_is_that_of_the_step_before_them(monkeypatch):
    held = {"now": 100, "most": 900}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held["most"])
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda: held.update(most=held["now"])
    )
    split, model = MemorySplit(), nn.Linear(1, 1)

    class State:
        global_step = 0

    def step() -> str:
        held.update(now=140)
        split.forward_ended()
        held.update(now=100, most=170)
        return "loss"

    split.on_step_begin(None, State, None, model)
    assert split.rehearse(step) == "loss" and split.peak_before == 900
    split.replayed()
    State.global_step = 1
    held.update(now=120, most=150)
    split.on_step_begin(None, State, None, model)
    split.replayed()
    split.on_step_end(None, State, None, torch.optim.SGD(model.parameters()))
    assert split.facts["activations_gb"] * 2**30 == pytest.approx(40, abs=600)
    assert split.facts["peak_gb"] * 2**30 == pytest.approx(120 + 70, abs=600)
    assert split.peak_before == 900
