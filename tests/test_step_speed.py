"""Planned time follows from FLOPs, traffic and the host."""

from dataclasses import replace

import pytest
from planned_steps import ALL, ATTENTION, forecast

from sftlab.models.random_models import random_lengths
from sftlab.paths import ROOT
from sftlab.planning.gpu_specs import GPUS
from sftlab.planning.plan import resized
from sftlab.planning.row_lengths import RowLengths, of_lengths
from sftlab.planning.step_memory import memory
from sftlab.planning.step_time import MATRIX, step_time
from sftlab.tables import read_csv

LLAMA_8B = {"shape": "llama3-8b"}
CAPTURED = {"captured_step": "true"}
FP8, APART = {"launch": "fp8"}, {"fused_lora": "false"}
QVO = ("q_proj", "v_proj", "o_proj")
QLORA = {
    "shape": "llama2-7b",
    "load_in_4bit": "true",
    "lora_r": 32,
    "optim": "paged_adamw_32bit",
}


def test_speed_follows_the_gpu_and_what_is_known_of_the_h200():
    assert forecast(gpu="h100-80").tokens_per_s < forecast(gpu="h200").tokens_per_s
    assert forecast(gpu="a100-80").tokens_per_s < 0.6 * forecast(gpu="h200").tokens_per_s
    assert forecast(gradient_checkpointing="true").tokens_per_s < 0.9 * forecast().tokens_per_s
    assert forecast(gradient_checkpointing="true").time.matrices > 1.3 * forecast().time.matrices
    one, two = forecast(global_batch_size=128), forecast("ddp", global_batch_size=128)
    assert 1.8 < two.tokens_per_s / one.tokens_per_s <= 2
    # results/throughput/throughput.csv
    rows = of_lengths(random_lengths(3000, 512), None, "its own")
    for launch, fields, speed in (
        ("single", {}, 100_047),
        ("single", {"targets": ALL, "fused_lora": "false"}, 85_827),
    ):
        assert forecast(launch, rows=rows, lora_dropout=0, **fields).tokens_per_s == pytest.approx(
            speed, rel=0.15
        )


FUSED = {  # the table's folder and variant: rows a step, their shortest and longest, steps, fields
    ("float8", "sft.py bf16, all linears, 64 rows"): (64, 16, 512, 60, {}),
    ("fused_lora_hopper", "sft.py bf16, all linears, 64 rows"): (64, 16, 512, 60, {}),
    ("captured_step", "sft.py bf16, all linears, 20 rows"): (20, 16, 512, 130, CAPTURED),
    ("peers_all_linears", "sft.py bf16, all linears, 64 rows"): (64, 16, 512, 60, {}),
    ("peers_all_linears", "sft.py fp8, all linears, 64 rows"): (64, 16, 512, 60, FP8),
    ("peers_qvo", "sft.py fp8, 64 rows"): (64, 16, 512, 60, FP8 | {"targets": QVO}),
    ("peers_8b", "sft.py bf16, 8B, 2 full rows of 4096"): (2, 4096, 4096, 40, LLAMA_8B),
    ("peers_8b", "sft.py fp8, 8B, 2 full rows of 4096"): (2, 4096, 4096, 40, LLAMA_8B | FP8),
    ("qlora", "sft.py QLoRA, 7B, kept activations, 42 rows, LoRA fused"): (
        *(42, 16, 1024, 40),
        QLORA,
    ),
    ("qlora", "sft.py QLoRA, 7B, kept activations, 11 rows"): (
        *(11, 16, 1024, 300),
        QLORA | CAPTURED,
    ),
    ("qlora", "sft.py QLoRA, 7B, kept activations, 4 rows"): (
        *(4, 16, 1024, 300),
        QLORA | CAPTURED,
    ),
    ("float8", "sft.py fp8, all linears, 64 rows"): (64, 16, 512, 60, FP8 | APART),
    ("float8", "sft.py fp8, 64 rows"): (64, 16, 512, 60, FP8 | {"targets": QVO}),
    ("float8_lora", "sft.py bf16, all linears, 64 rows"): (64, 16, 512, 60, {}),
    ("float8_lora", "sft.py fp8, all linears, 64 rows, LoRA not fused"): (
        *(64, 16, 512, 60),
        FP8 | APART,
    ),
}
# these were measured before norms were computed again
KEPT_INPUTS = {"float8", "captured_step", "qlora"}


@pytest.mark.parametrize("table, variant", FUSED)
def test_speed_and_memory_with_fused_layers_are_near_what_was_measured(table, variant):
    rows, shortest, longest, steps, fields = FUSED[table, variant]
    (line,) = [
        one
        for one in read_csv(ROOT / "results" / table / "throughput.csv")
        if one["variant"] == variant
    ]
    planned = forecast(
        rows=of_lengths(random_lengths(3000, longest, shortest), None, "its own"),
        per_device_train_batch_size=rows, global_batch_size=rows, max_length=longest,
        lora_dropout=0, max_steps=steps, **{"targets": ALL} | fields,
    )  # fmt: skip
    planned = resized(planned, planned.micro_batch, keeps_inputs=table in KEPT_INPUTS)
    assert planned.tokens_per_s == pytest.approx(float(line["tokens_per_s"]), rel=0.06)
    assert planned.memory.allocated / 2**30 == pytest.approx(float(line["peak_gb"]), rel=0.07)


@pytest.mark.parametrize(
    "launch, rank, less",
    [("single", 16, 1), ("single", 12, 0), ("single", 40, 0), ("fp8", 16, 1), ("fp8", 40, 0)],
)
def test_lora_in_the_mlps_kernels_is_planned_where_those_are(launch, rank, less):
    step = forecast(launch, targets=ALL, lora_dropout=0, lora_r=rank).step
    hopper = GPUS["h200"]
    moved, elsewhere = (
        step_time(step, gpu).memory_traffic for gpu in (hopper, replace(hopper, capability=(8, 0)))
    )
    assert (moved < elsewhere) == less


PAIRS = {"method": "dpo"}


@pytest.mark.parametrize(
    "launch, fields, planned",
    [
        ("fp8", {}, True),
        ("fp8", {"lora_dropout": 0.1}, False),
        ("fp8", {"lora_dropout": 0.1, "targets": QVO}, True),
        ("fp8", {"lora_bias": "true"}, False),
        ("fp8", {"compile_layers": "false"}, False),
        ("fp8", {"load_in_4bit": "true"}, True),
        ("single", {}, False),
        ("fp8", PAIRS, True),
        ("fp8", PAIRS | {"adapter_name_or_path": "an-adapter"}, False),
    ],
)
def test_an_mlp_in_float8_is_planned_as_one_function_where_a_run_makes_it_one(
    launch, fields, planned
):
    fields = {"targets": ALL, "lora_dropout": 0} | fields
    assert forecast(launch, **fields).step.float8_mlp == planned


def test_weights_in_4_bits_under_fp8_take_half_the_products_and_one_weight_in_float8():
    # with dropout gate, up and down are no function of their own
    fields = QLORA | {"targets": ALL, "lora_dropout": 0.05, "fused_lora": "false"}
    fields |= {"rows": RowLengths(38_000, 64, 0, 64, "said"), "per_device_train_batch_size": 64}
    sixteen, eight = (
        replace(forecast(launch, **fields).step, float8_head=False) for launch in ("single", "fp8")
    )
    assert memory(eight).at == memory(sixteen).at == "backward"
    scratch = memory(eight).allocated - memory(sixteen).allocated
    assert scratch == 4096 * 11008, "the largest weight"
    head = 4 * eight.weights.head * eight.tokens / (GPUS["h200"].tflops("bf16") * 1e12 * MATRIX)
    slow, fast = (step_time(step, GPUS["h200"]) for step in (sixteen, eight))
    assert fast.matrices - head == pytest.approx((slow.matrices - head) / 2, rel=0.01)
    assert fast.dequantising == pytest.approx(slow.dequantising * 1.5 / 2.5)
    assert fast.memory_traffic > slow.memory_traffic


def test_checkpointing_costs_a_forward_whatever_is_trained():
    lora, whole = (
        [forecast(use_peft=peft, gradient_checkpointing=c).time for c in ("false", "true")]
        for peft in ("true", "false")
    )
    again = [checkpointed.matrices - plain.matrices for plain, checkpointed in (lora, whole)]
    assert again[0] == pytest.approx(again[1])
    assert again[0] == pytest.approx(
        lora[0].matrices * 2 / 4 * 0.79, rel=0.01
    )  # a fifth is the head
    assert lora[1].attention / lora[0].attention == pytest.approx(4.5 / 3.5)


def test_bitsandbytes_optimizers_take_the_host_every_tensor_once_a_step():
    rows, a_step = RowLengths(38_000, 64, 0, 64, "said"), {}
    for targets, accumulation, captured in (
        (ATTENTION, 1, "false"), (ALL, 1, "false"), (ALL, 4, "false"), (ALL, 4, "true")
    ):  # fmt: skip
        fields = {"rows": rows, "targets": targets, "per_device_train_batch_size": 4}
        fields |= {"captured_step": captured, "global_batch_size": 4 * accumulation}
        paged, fused = (
            forecast(optim=name, **fields).time.host * accumulation
            for name in ("paged_adamw_32bit", "adamw_torch_fused")
        )
        a_step[len(targets), accumulation, captured] = paged - fused
    whole = a_step[7, 1, "false"]
    assert whole == pytest.approx(7 / 3 * a_step[3, 1, "false"])
    assert a_step[7, 4, "false"] == pytest.approx(whole) and 0.01 < whole < 0.02
    assert a_step[7, 4, "true"] == pytest.approx(whole)


def test_a_loss_scale_is_waited_for_once_a_step():
    waits = [
        forecast("fp16", per_device_train_batch_size=8, global_batch_size=n).time.waiting
        for n in (8, 32)
    ]
    assert waits[1] == pytest.approx(waits[0] / 4)


def test_time_and_work_follow_from_rows_and_epochs():
    once, twice = forecast(num_train_epochs=1), forecast(num_train_epochs=2)
    assert once.steps == 38_000 // 64
    assert twice.steps == 2 * once.steps or twice.steps == (38_000 // 64 * 2)
    assert twice.total_flops == pytest.approx(2 * once.total_flops, rel=0.01)
    assert twice.hours == pytest.approx(2 * once.hours, rel=0.01)
    # 4 FLOPs a parameter and token
    assert once.total_flops / (once.steps * 64 * 315) == pytest.approx(4.08 * 1.236e9, rel=0.03)
