"""The memory of a step by part: exact for tensors that can be counted, and what each technique must do to the rest."""

import pytest
from conftest import launch, read, short_fields

GB = 2**30


def measured(base, rows, tmp_path, name, **more):
    fields = short_fields(base, rows, tmp_path / name) | {"measure_memory": "true", "lora_dropout": "0", **more}
    done = launch("cpu", {k: str(v) for k, v in fields.items()})
    assert done.returncode == 0, done.stderr[-2000:]
    run = read(tmp_path / name)
    (peak,) = run["measured"]["peak_memory"]
    return run, {part.removesuffix("_gb"): size * GB for part, size in peak["step"].items()}


def test_the_parts_of_a_step_s_memory(base, rows, tmp_path):
    run, lora = measured(base, rows, tmp_path, "lora")
    trained = run["ran"]["trainable_parameters"]
    rounding = pytest.approx(4 * trained, abs=1e-6 * GB)
    assert lora["gradients"] == rounding
    assert lora["optimizer_state"] == pytest.approx(8 * trained, abs=2e-6 * GB), "AdamW: two moments"
    assert lora["peak"] >= lora["parameters"] + lora["optimizer_state"] + lora["activations"]
    run, full = measured(base, rows, tmp_path, "full", use_peft="false", optim="sgd", gradient_checkpointing="true")
    assert full["gradients"] == pytest.approx(4 * run["ran"]["trainable_parameters"], abs=1e-6 * GB)
    assert full["gradients"] == pytest.approx(full["parameters"], rel=0.01)
    assert full["optimizer_state"] == 0
    assert full["activations"] < lora["activations"] / 2, "checkpointing"
    assert run["ran"]["trainable_parameters"] > 5 * trained
    _, accumulated = measured(base, rows, tmp_path, "accumulated", per_device_train_batch_size=2)
    assert accumulated["activations"] < lora["activations"] / 2
    assert accumulated["gradients"] == lora["gradients"]
