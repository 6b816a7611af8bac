"""The memory of a step by part:

exact for tensors that can be counted, and what each technique must do to the rest.
"""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import read, short_fields
from torch import nn

from sftlab.fastpath.float8 import FrozenFloat8Linear
from sftlab.measurement.memory import MemorySplit

GB = 2**30


def test_the_parts_of_a_step_s_memory(base, rows, tmp_path, trained_here):
    def measured(name, **more):
        fields = short_fields(base, rows, tmp_path / name) | {
            "measure_memory": "true",
            "lora_dropout": "0",
            **more,
        }
        trained_here(fields)
        run = read(tmp_path / name)
        (peak,) = run["measured"]["peak_memory"]
        return run, {part.removesuffix("_gb"): size * GB for part, size in peak["step"].items()}

    run, lora = measured("lora")
    trained = run["ran"]["trainable_parameters"]
    rounding = pytest.approx(4 * trained, abs=1e-6 * GB)
    assert lora["gradients"] == rounding
    assert lora["optimizer_state"] == pytest.approx(8 * trained, abs=2e-6 * GB), (
        "AdamW: two moments"
    )
    assert lora["peak"] >= lora["parameters"] + lora["optimizer_state"] + lora["activations"]
    run, full = measured("full", use_peft="false", optim="sgd", gradient_checkpointing="true")
    assert full["gradients"] == pytest.approx(4 * run["ran"]["trainable_parameters"], abs=1e-6 * GB)
    assert full["gradients"] == pytest.approx(full["parameters"], rel=0.01)
    assert full["optimizer_state"] == 0
    assert full["activations"] < lora["activations"] / 2, "checkpointing"
    assert run["ran"]["trainable_parameters"] > 5 * trained
    _, accumulated = measured("accumulated", per_device_train_batch_size=2)
    assert accumulated["activations"] < lora["activations"] / 2
    assert accumulated["gradients"] == lora["gradients"]


@pytest.mark.parametrize(
    ("double_quantised", "bytes_a_weight"),
    [(None, 2), (False, 0.5 + 4 / 64), (True, 0.5 + 1 / 64 + 4 / 64 / 256)],
)
def test_weights_count_with_all_that_they_need(double_quantised, bytes_a_weight):
    given = nn.Linear(1024, 2048, bias=False, dtype=torch.bfloat16)
    if double_quantised is None:
        linear = FrozenFloat8Linear(given)
    else:
        linear = Linear4bit(1024, 2048, bias=False, compress_statistics=double_quantised)
        linear.load_state_dict(given.state_dict())
        linear = linear.to("cpu")
    expected = pytest.approx(bytes_a_weight * given.weight.numel(), rel=0.005)
    assert bytes_of_parameters(nn.Sequential(linear)) == expected
    linear.weight = nn.Parameter(linear.weight.data, requires_grad=False)  # as FSDP gives it back
    assert bytes_of_parameters(nn.Sequential(linear)) == expected


def bytes_of_parameters(model):
    """As a step's split has it."""

    class State:
        global_step = 0

    split = MemorySplit()
    split.on_step_begin(None, State, None, model)
    State.global_step = 1
    split.on_step_begin(None, State, None, model)
    split.forward_ended()
    split.on_step_end(None, State, None, torch.optim.SGD([nn.Parameter(torch.zeros(1))]))
    return split.facts["parameters_gb"] * GB
