"""Planned memory is near what was measured of whole trainings on GPUs."""

import pytest
from planned_steps import ALL, forecast

from sftlab.models.random_models import random_lengths
from sftlab.planning.row_lengths import of_lengths


def test_measured_runs_of_the_fast_path_are_near():
    """results/throughput/throughput.csv: 1B shape on an H200, 120 steps of lognormal rows."""
    rows = of_lengths(random_lengths(3000, 512), None, "its own")
    for launch, count, fields, peak in (
        ("single", 32, {}, 14.445),
        ("single", 64, {"targets": ALL, "fused_lora": "false"}, 33.456),
        ("fp8", 64, {}, 25.278),
        ("single", 32, {"compile_layers": "false"}, 19.694),
        ("ddp", 64, {}, 24.014),
        ("fsdp", 64, {"fsdp_layers_per_unit": 1}, 23.456),
    ):
        batch = {
            "per_device_train_batch_size": count,
            "global_batch_size": 0,
            "max_steps": 120,
            "lora_dropout": 0,
        }
        assert forecast(
            launch, rows=rows, **batch, **fields
        ).memory.allocated / 2**30 == pytest.approx(peak, rel=0.05)


def test_measured_runs_of_whole_trainings_are_near():
    """results/techniques: fp32 weights, 16 rows a step, a gradient beside each of them, AdamW's
    copies.
    """
    rows = of_lengths(random_lengths(3000, 512), None, "its own")
    whole = {"use_peft": "false", "dtype": "float32", "global_batch_size": 16, "max_steps": 10}
    for precision, micro_batch, checkpointing, optimizer, peak, at in (
        ("no", 16, "true", "sgd", 10.35, "gradients"),
        ("no", 4, "true", "sgd", 11.24, "gradients"),
        ("no", 16, "true", "adamw_torch", 23.11, "optimizer"),
        ("bf16", 4, "true", "adamw_torch", 23.09, "optimizer"),
        ("no", 4, "false", "adamw_torch", 23.16, "optimizer"),
        ("bf16", 16, "false", "adamw_torch", 24.18, "loss"),
        ("no", 16, "false", "adamw_torch", 28.52, "loss"),
    ):
        fields = {
            "per_device_train_batch_size": micro_batch,
            "gradient_checkpointing": checkpointing,
        }
        plan = forecast(
            "fp32",
            rows=rows,
            flags={"mixed_precision": precision},
            **whole,
            **fields,
            optim=optimizer,
        )
        assert plan.memory.allocated / 2**30 == pytest.approx(peak, rel=0.05)
        assert plan.memory.at == at
