"""Planned memory grows and shrinks as it must, up to the largest micro-batch."""

import pytest
from conftest import arguments
from planned_steps import ALL, forecast
from transformers import AutoConfig, PhiConfig

from sftlab.config.launch import exported, launched
from sftlab.config.parser import parse_recipe
from sftlab.data.samplers import balanced
from sftlab.models.random_models import random_lengths
from sftlab.planning.gpu_specs import GPUS
from sftlab.planning.plan import make_plan, most_rows, resized
from sftlab.planning.row_lengths import RowLengths, of_lengths
from sftlab.planning.weight_memory import count_weights


def test_the_parts_sum_to_the_peak():
    for launch, fields in (
        ("single", {}),
        ("ddp", {"targets": ALL}),
        ("fsdp", {"gradient_checkpointing": "true"}),
    ):
        plan = forecast(launch, **fields).memory
        parts = (
            "parameters",
            "adapter",
            "gradients",
            "optimizer_state",
            "activations",
            "logits",
            "communication",
        )
        assert plan.allocated == sum(getattr(plan, part) for part in parts) + plan.workspace
        assert plan.needed > plan.allocated + plan.fragmentation > plan.allocated
        assert all(size >= 0 for size in plan[:-1])


@pytest.mark.long
def test_memory_grows_with_rows_length_and_rank():
    fields = {"global_batch_size": 0}
    for extra in ({"gradient_checkpointing": "true"}, {"compile_layers": "false", "targets": ALL}):
        peaks = [
            forecast(per_device_train_batch_size=n, **fields, **extra).memory.allocated
            for n in (1, 8, 9)
        ]
        assert peaks == sorted(set(peaks))
        lengths = [RowLengths(1000, n, 0, n, "said") for n in (128, 640, 4096)]
        peaks = [
            forecast(rows=rows, max_length=4096, **fields, **extra).memory.allocated
            for rows in lengths
        ]
        assert peaks == sorted(set(peaks))
        peaks = [forecast(lora_r=n, **fields, **extra).memory.allocated for n in (1, 64)]
        assert peaks == sorted(set(peaks))


def test_techniques_change_memory_in_the_direction_they_are_for():
    peak = {
        name: forecast(launch, **fields).memory
        for name, launch, fields in (
            ("plain", "single", {}),
            ("checkpointed", "single", {"gradient_checkpointing": "true"}),
            ("eager", "single", {"compile_layers": "false"}),
            ("fsdp", "fsdp", {"global_batch_size": 128}),
            ("4 bits", "single", {"load_in_4bit": "true", "bnb_4bit_quant_storage": "bfloat16"}),
            ("fp8", "fp8", {}),
            ("fp32", "fp32", {}),
        )
    }
    assert peak["checkpointed"].activations < 0.4 * peak["plain"].activations
    assert peak["eager"].activations > 1.3 * peak["plain"].activations
    assert peak["fsdp"].parameters == peak["plain"].parameters // 2
    assert peak["4 bits"].parameters < 0.5 * peak["plain"].parameters
    assert peak["fp8"].parameters == peak["plain"].parameters
    assert peak["fp32"].allocated > 1.8 * peak["plain"].allocated


def test_layers_of_another_kind_and_8_bits_are_refused(base, fields):
    with launched(exported("accelerate_configs/fp32.yaml")) as launch:
        recipe = parse_recipe([*arguments(fields), "--load_in_8bit=true"], launch)
        with pytest.raises(ValueError, match="no plan is made for weights in 8 bits"):
            count_weights(recipe, AutoConfig.from_pretrained(base))
        recipe = parse_recipe([*arguments(fields), "--lora_target_modules=all-linear"], launch)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
        with pytest.raises(ValueError, match="phi has dense, fc1, fc2 in a layer"):
            count_weights(recipe, PhiConfig(**sizes, vocab_size=100, pad_token_id=0))
    with pytest.raises(ValueError, match="LoRA on lm_head: plans are made for q_proj"):
        forecast(targets=["q_proj", "lm_head"])


def test_the_largest_micro_batch_is_about_what_sampling_finds():
    import numpy as np

    lengths, generator = random_lengths(3000, 512), np.random.default_rng(0)
    rows = of_lengths(lengths, len(lengths), "its own")
    for processes in (1, 2):  # or micro-batches of one process
        most = []
        for _ in range(20):
            batches = [generator.choice(3000, 32 * processes, replace=False) for _ in range(100)]
            most.append(
                max(
                    lengths[bin_].sum()
                    for one in batches
                    for bin_ in balanced(list(one), lengths, processes)
                )
            )
        assert rows.largest(32, processes, True, 100) == pytest.approx(np.mean(most), rel=0.04)
    assert RowLengths(1, 512, 0, 512, "full").largest(8, 1, True, 10) == 4096
    assert rows.largest(8, 1, False, 10) == 8 * 512


def test_the_largest_rows_fit_and_one_more_does_not():
    plan = forecast(gpu="a100-40")
    most = most_rows(plan)
    assert resized(plan, most).fits
    assert not resized(plan, most + 1).fits
    assert most_rows(forecast(gpu="t4", shape="llama2-7b", launch="fp16")) == 0


def test_accumulation_shares_a_steps_work_and_keeps_gradients_beside_activations():
    rows = RowLengths(38_000, 64, 0, 64, "said")
    one, four = (
        forecast(rows=rows, per_device_train_batch_size=4, global_batch_size=n) for n in (4, 16)
    )
    assert one.time.host > one.time.gpu, "a step so short waits for the host"
    assert four.time.gpu == one.time.gpu and four.time.host < one.time.host
    assert one.step_seconds < four.step_seconds < 4 * one.step_seconds
    whole = forecast(use_peft="false")
    assert whole.step.accumulation == 1 and whole.memory.gradients == 0, (
        "they come as the activations go"
    )
    halved = resized(whole, whole.micro_batch // 2)
    assert halved.step.accumulation == 2 and halved.memory.gradients > 0


def test_a_model_of_experts_is_refused():
    from transformers import MixtralConfig

    with launched(exported("accelerate_configs/single.yaml")) as launch:
        recipe = parse_recipe(["--config", "recipes/llama3.2-1b/attn_r16.yaml"], launch)
        with pytest.raises(ValueError, match="mixture of experts"):
            make_plan(
                recipe,
                MixtralConfig(num_hidden_layers=1),
                launch,
                GPUS["h200"],
                RowLengths(1, 10, 0, 10, ""),
            )
