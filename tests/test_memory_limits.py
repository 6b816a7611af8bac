"""Planned memory grows and shrinks as it must, up to the largest micro-batch."""

from dataclasses import replace

import pytest
from conftest import arguments
from planned_steps import ALL, forecast
from transformers import AutoConfig, Qwen3MoeConfig

from sftlab.config.launch import exported, launched
from sftlab.config.parser import parse_recipe
from sftlab.data.samplers import balanced
from sftlab.models.random_models import random_lengths
from sftlab.planning.gpu_specs import GPUS
from sftlab.planning.plan import make_plan, most_rows, resized
from sftlab.planning.row_lengths import RowLengths, of_lengths
from sftlab.planning.step_memory import communication_bytes
from sftlab.planning.step_time import HOST_UNIT, host_seconds
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
    head = peak["fp8"].parameters - peak["plain"].parameters
    assert head == 128_256 * 2048, "the head for gradients, a byte a weight"
    assert peak["fp32"].allocated > 1.8 * peak["plain"].allocated


def test_units_of_several_layers_take_memory_and_save_the_host_time():
    two = {"flags": {"num_processes": 2}}
    one, four = (forecast("fsdp", fsdp_layers_per_unit=size, **two) for size in (1, 4))
    layer, layers = one.step.weights.layer, one.step.shape.layers
    assert four.step == forecast("fsdp", **two).step, (
        "1B's layers have 0.12 GB, and 0.5 is the limit"
    )
    for at, more in (("loss", 3), ("backward", 6)):
        held = communication_bytes(four.step, at) - communication_bytes(one.step, at)
        assert held == more * layer
    saved = host_seconds(one.step) - host_seconds(four.step)
    assert saved == pytest.approx(HOST_UNIT[True] * layers * 3 / 4)
    all_layers = communication_bytes(replace(four.step, reshard=False), "loss")
    assert communication_bytes(replace(four.step, layers_per_unit=layers), "backward") == all_layers


def test_weights_in_8_bits_and_lora_on_the_head_are_refused(base, fields):
    with launched(exported("accelerate_configs/fp32.yaml")) as launch:
        recipe = parse_recipe([*arguments(fields), "--load_in_8bit=true"], launch)
        with pytest.raises(ValueError, match="no plan is made for weights in 8 bits"):
            count_weights(recipe, AutoConfig.from_pretrained(base))
    with pytest.raises(ValueError, match="LoRA on lm_head: no plan is made"):
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


QWEN_30B = {
    **{"hidden_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 32, "head_dim": 128},
    **{"num_key_value_heads": 4, "num_local_experts": 128, "num_experts_per_tok": 8},
    **{"moe_intermediate_size": 768, "intermediate_size": 6144, "vocab_size": 151936},
}


def plan_of_mixture(config, *fields):
    argv = ["--config", "recipes/llama3.2-1b/attn_r16.yaml", *fields]
    with launched(exported("accelerate_configs/single.yaml")) as launch:
        recipe = parse_recipe(argv, launch)
        return make_plan(recipe, config, launch, GPUS["h200"], RowLengths(1000, 315, 140, 512, ""))


def test_a_mixture_is_planned_by_the_experts_that_a_token_visits():
    plan = plan_of_mixture(Qwen3MoeConfig(**QWEN_30B))
    attention = 2048 * 128 * (32 + 4 + 4 + 32)
    router, expert = 2048 * 128, 3 * 2048 * 768
    assert plan.step.weights.linears == attention + router + 8 * expert
    everything = plan_of_mixture(Qwen3MoeConfig(**QWEN_30B | {"num_experts_per_tok": 128}))
    assert plan.memory.parameters == everything.memory.parameters > 4 * 128 * expert * 2
    assert 10 * plan.total_flops < everything.total_flops * 2
    assert plan.memory.activations < everything.memory.activations / 4
    assert plan.time.matrices < everything.time.matrices
    few = resized(plan, 1)
    read = few.step.weights.layer * 4 * 2 / (GPUS["h200"].memory_gbs * 1e9)
    assert few.time.matrices > read, "a pass reads every expert, however few tokens there are"


@pytest.mark.long
def test_lora_on_experts_is_planned_without_a_copy_of_them():
    config, targets = (
        Qwen3MoeConfig(**QWEN_30B),
        ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    asked = ["--lora_dropout=0", "--compile_layers=false"]
    attention, experts = (
        resized(plan_of_mixture(config, *asked, *more), 1)
        for more in ([], ["--lora_target_parameters", *targets])
    )
    rank, layers, copied = 16, 4, 3 * 128 * 2048 * 768 * 2
    matrices = layers * 128 * rank * (2048 + 2 * 768 + 768 + 2048)
    assert experts.step.weights.trained == attention.step.weights.trained + matrices
    assert experts.memory.adapter == attention.memory.adapter + 4 * matrices
    more = experts.memory.activations - attention.memory.activations
    # rounded matrices, what enters them, and a gradient of the matrices that is added up
    assert 2 * matrices < more < 2 * matrices + copied / 10
    router = plan_of_mixture(config, "--lora_target_modules=all-linear", "--lora_dropout=0")
    assert router.step.measured.adapters == 7, "four linears, two weights of experts, a router"


@pytest.mark.parametrize(
    ("config", "fields", "why"),
    [
        (Qwen3MoeConfig(**QWEN_30B), ["--dtype=float32"], "made for bf16 alone"),
        (Qwen3MoeConfig(**QWEN_30B), ["--use_peft=false"], "full fine-tuning of a mixture"),
    ],
)
def test_other_mixtures_are_refused(config, fields, why):
    with pytest.raises(ValueError, match=why):
        plan_of_mixture(config, *fields)
