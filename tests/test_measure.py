"""What a run measures: real tokens, the steady state alone, FLOPs that LoRA really needs.

Exact likelihoods.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sftlab.measurement import hardware_limit, throughput
from sftlab.measurement.flops import Flops, flops_per_token
from sftlab.measurement.throughput import Meter
from sftlab.models.likelihood import likelihood, with_fused_head


def test_flops_are_four_a_frozen_and_six_a_trained_parameter():
    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            tie_word_embeddings=True,
        )
        model = LlamaForCausalLM(config)
        layer = 2048 * (2048 + 512 + 512 + 2048) + 3 * 2048 * 8192
        matrices = 16 * layer + 128256 * 2048
        tuned = get_peft_model(
            model, LoraConfig(r=16, target_modules=["q_proj", "v_proj", "o_proj"])
        )
    lora = 16 * 16 * ((2048 + 2048) + (2048 + 512) + (2048 + 2048))
    flops = flops_per_token(tuned)
    assert flops.loss_token == 4 * 128256 * 2048
    assert sum(flops) == 4 * matrices + 6 * lora
    assert abs(matrices - 1.236e9) < 1e6


class Clock:
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(throughput, "gather_object", lambda values: values)


def test_a_token_is_worked_on_by_the_experts_it_goes_to(monkeypatch):
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = MixtralConfig(
        **shape, num_attention_heads=2, num_local_experts=8, num_experts_per_tok=2
    )
    model = get_peft_model(MixtralForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj"]))
    experts = 2 * 3 * 32 * 64
    attention = 2 * 32 * 32 + 2 * 32 * config.num_key_value_heads * 16
    assert flops_per_token(model).token == 4 * (experts + attention + 8 * 32) + 6 * 4 * (32 + 32)
    monkeypatch.setattr(
        MixtralConfig,
        "to_dict",
        lambda config: {"num_local_experts": 8, "num_experts_per_tok": [1, 2]},
    )
    assert flops_per_token(model).token == 4 * (experts * 4 + attention + 8 * 32) + 6 * 4 * (
        32 + 32
    )


def test_of_a_module_that_is_saved_whole_its_copy_counts():
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(**shape, num_attention_heads=2, tie_word_embeddings=False)
    plain = flops_per_token(
        get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj"]))
    )
    saved = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "down_proj"])
    found = flops_per_token(get_peft_model(LlamaForCausalLM(config), saved))
    assert found.loss_token == 6 * 64 * 32
    assert found.token == plain.token + 2 * 64 * 32, "trained, it takes its own gradient"


def test_the_meter_counts_real_tokens_and_leaves_out_warm_up_evaluation_and_saving(monkeypatch):
    clock, meter = Clock(monkeypatch), Meter()
    state = SimpleNamespace(global_step=0, max_steps=20)
    for step in range(20):
        control = SimpleNamespace(
            should_evaluate=step == 9, should_save=step == 14, should_training_stop=False
        )
        meter.on_step_begin(None, state, control)
        clock.now += 100.0 if step < 5 else 2.0
        for _ in range(2):
            meter.count(tokens=4, rows=2, loss_tokens=3)
        state.global_step += 1
        meter.on_step_end(None, state, control)
        clock.now += 1000.0 if step in (9, 14) else 0.0
    facts = meter.facts(Flops(token=1.5e12, loss_token=2e12))
    assert facts["timed_steps"] == 15
    assert facts["timed_seconds"] == 30.0
    assert facts["tokens_per_s"] == 15 * 2 * 4 / 30.0
    assert facts["rows_per_s"] == 15 * 2 * 2 / 30.0
    assert facts["step_time_s"] == 2.0
    assert facts["model_tflops_per_s"] == 12.0
    tiny = meter.facts(Flops(token=3e5, loss_token=0.0))
    monkeypatch.setattr(hardware_limit, "kept_rates", lambda *_: [0.9, 1.0, 1.2])
    of_limit = hardware_limit.measure_mfu(tiny, torch.device("cuda"), torch.float32, world_size=2)
    assert of_limit["limit_range_tflops_per_s"] == [0.9, 1.2]
    assert of_limit["share_of_limit"] == pytest.approx(4 * 3e5 / 1e12 / 2), (
        "of a model however small"
    )


def test_the_meter_stops_before_the_evaluation_at_an_epochs_end(monkeypatch):
    clock, meter = Clock(monkeypatch), Meter()
    state, control = SimpleNamespace(global_step=0, max_steps=20), SimpleNamespace()
    for step in range(20):
        control.should_evaluate = control.should_save = control.should_training_stop = False
        meter.on_step_begin(None, state, control)
        clock.now += 2.0
        meter.count(tokens=4, rows=2, loss_tokens=3)
        state.global_step += 1
        meter.on_step_end(None, state, control)
        if step == 9:
            control.should_evaluate = True
            meter.on_epoch_end(None, state, control)
            clock.now += 1000.0
    facts = meter.facts(Flops(token=1.0, loss_token=1.0))
    assert (facts["timed_steps"], facts["timed_seconds"]) == (15, 30.0)


def test_a_matrix_rate_is_measured_once_a_machine_and_dtype(monkeypatch, tmp_path):
    rates, gpu = iter(range(1, 100)), torch.device("cuda")
    monkeypatch.setattr(hardware_limit, "KEPT", tmp_path / "data" / "rates.json")
    monkeypatch.setattr(hardware_limit, "matrix_rate", lambda *_: next(rates) * 1e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    first = hardware_limit.measure_mfu({"model_tflops_per_s": 1.5}, gpu, torch.bfloat16, 1)
    assert (first["limit_tflops_per_s"], first["share_of_limit"]) == (3, 0.5)
    assert first["limit_range_tflops_per_s"] == [1, 5]
    assert hardware_limit.kept_rates(gpu, torch.bfloat16) == [1, 2, 3, 4, 5]
    assert hardware_limit.kept_rates(gpu, torch.float16) == [6, 7, 8, 9, 10]
    hardware_limit.KEPT.write_text("damaged")
    assert hardware_limit.kept_rates(gpu, torch.bfloat16)[0] == 11


def test_a_cpu_has_no_mfu():
    found = hardware_limit.measure_mfu(
        {"model_tflops_per_s": 1.0}, torch.device("cpu"), torch.float32, 1
    )
    assert set(found.values()) == {None}


def test_a_run_too_short_to_time_says_so(monkeypatch):
    monkeypatch.setattr(throughput, "gather_object", lambda values: values)
    assert Meter().facts(Flops(1.0, 0.0))["tokens_per_s"] is None


@pytest.fixture
def scored_model(base):
    return with_fused_head(AutoModelForCausalLM.from_pretrained(base)).eval()


def encoded_rows(count=23):
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        ids = rng.integers(0, 255, rng.integers(8, 60)).tolist()
        cut = int(rng.integers(1, len(ids) - 1))
        rows.append({"input_ids": ids, "labels": [-100] * cut + ids[cut:]})
    return rows


def batches(rows, size):
    collate = DataCollatorForLanguageModeling(pad_token_id=258)
    return [collate(rows[i : i + size]) for i in range(0, len(rows), size)]


def test_the_likelihood_is_the_shifted_masked_sum_and_does_not_depend_on_the_batch(scored_model):
    rows = encoded_rows()
    expected = []
    for row in rows:
        logits = (
            scored_model(torch.tensor([row["input_ids"]]))
            .logits.detach()[0, :-1]
            .double()
            .log_softmax(-1)
        )
        picked = -logits.gather(1, torch.tensor(row["input_ids"][1:])[:, None])[:, 0]
        response = torch.tensor(row["labels"][1:]) != -100
        expected.append(
            [picked[response].sum().item(), response.sum().item(), picked.sum().item(), len(picked)]
        )
    expected = np.array(expected)
    for size in (1, 4, 16):
        found = np.hstack(likelihood(scored_model, batches(rows, size)))
        np.testing.assert_allclose(found, expected, rtol=2e-6)
        for nats in (0, 2):
            mean = found[:, nats].sum() / found[:, nats + 1].sum()
            assert abs(mean - expected[:, nats].sum() / expected[:, nats + 1].sum()) < 1e-6


def test_a_loss_that_is_not_finite_names_its_row(scored_model):
    with torch.no_grad():
        scored_model.get_input_embeddings().weight[7] = float("nan")
    rows = [
        {"input_ids": [1, 2, 3], "labels": [1, 2, 3]},
        {"input_ids": [1, 7, 3], "labels": [1, 7, 3]},
    ]
    for names, number in ((None, 1), ([40, 50], 50)):
        with pytest.raises(
            ValueError, match=f"row {number}: the model gives no finite probability"
        ):
            likelihood(scored_model, batches(rows, 1), names=names)
