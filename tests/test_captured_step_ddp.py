"""Two processes that record their steps train as DDP does, and stop recording together."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, launch_command, read, short_fields
from tiny_base import write_jsonl
from torch import nn

from sftlab.fastpath.captured_step import StaticGradients

MICRO_BATCHES = 6 * 2  # of a process


@pytest.fixture(scope="module")
def fields(base, tmp_path_factory) -> dict[str, str]:
    """A run of six steps, each of two micro-batches of two rows in each of two processes."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [
        {
            "instruction": "Repeat." * (1 + i * 7 % 12),
            "response": f"It is {i}" + "!" * (i * 37 % 131),
        }
        for i in range(120)
    ]
    return short_fields(base, write_jsonl(folder / "rows.jsonl", rows), folder / "plain") | {
        "per_device_train_batch_size": "2",
        "max_length": "256",
        "packing": "true",
        "gradient_checkpointing": "false",
        "eval_strategy": "no",
        "lora_dropout": "0",
        "max_grad_norm": "0.05",
    }


@pytest.fixture
def trained(fields, monkeypatch, tmp_path):
    """Run in two processes; gives run.json."""

    def train(ends: int = 0, **more: object) -> dict:
        asked = (
            fields | {"output_dir": str(tmp_path / "run")} | {k: str(v) for k, v in more.items()}
        )
        typed = launch_command("cpu_ddp", asked)
        words = [word.replace("recipes/sft.py", "tests/captured_on_cpu.py") for word in typed]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert (done.returncode != 0) == ends, done.stderr[-3000:]
        return read(asked["output_dir"])

    return train


def losses(run: dict) -> list[float]:
    return [loss for _, loss in run["losses"]]


def norms(run: Path) -> list[float]:
    state = json.loads((run / "checkpoint-6" / "trainer_state.json").read_text())
    return [entry["grad_norm"] for entry in state["log_history"] if "grad_norm" in entry]


def test_one_message_for_each_dtype_averages_the_gradients_and_carries_a_note(monkeypatch):
    sent = []

    def add_up(tensor: torch.Tensor) -> None:
        """Three other processes have the same gradients, and no note."""
        sent.append(tensor.numel())
        tensor[:-1] *= 4

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.distributed, "all_reduce", add_up)
    weights = [
        nn.Parameter(torch.ones(3)),
        nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
        nn.Parameter(torch.ones(5)),
    ]
    gradients = StaticGradients(weights)
    gradients.attach()
    sum(one.float().sum() * 3 for one in weights).backward()
    assert float(gradients.average(1.0)) > 0 and len(sent) == 2
    assert all((one.grad == 3).all() for one in weights)
    assert float(gradients.average(0.0)) == 0


@pytest.mark.parametrize("checkpointed", [pytest.param("false", marks=pytest.mark.long), "true"])
def test_two_processes_that_record_train_as_plain_ones(trained, tmp_path, checkpointed):
    more = {"gradient_checkpointing": checkpointed}
    plain = trained(output_dir=tmp_path / "plain", **more)
    mine = trained(captured_step="true", **more)
    assert mine["ran"]["strategy"] == "ddp" and mine["ran"]["accumulation"] == 2
    assert mine["ran"]["captured_step"] and not plain["ran"]["captured_step"]
    facts = mine["measured"]["captured_step"]
    assert 3 <= facts["recordings"] <= MICRO_BATCHES and facts["plain_micro_batches"] == 0
    assert losses(mine) == pytest.approx(losses(plain), abs=1e-6)
    assert len(losses(mine)) == 6 and losses(mine)[0] != losses(mine)[-1]
    found, expected = norms(tmp_path / "run"), norms(tmp_path / "plain")
    assert found == pytest.approx(expected, rel=1e-4) and len(found) == 6
    assert max(found) > 0.05, "the norm is clipped"


@pytest.mark.parametrize(
    "fails, why",
    [
        ("1 2", "process 1: out of memory"),
        pytest.param("0 2 wrong", "process 0: the replayed step's loss is", marks=pytest.mark.long),
        pytest.param("1 0", "process 1: out of memory", marks=pytest.mark.long),
    ],
)
def test_a_process_that_cannot_record_takes_all_back_to_plain_steps(
    trained, tmp_path, monkeypatch, fails, why
):
    """With the losses of one that can; dropout shows which random numbers were drawn."""
    more = {"captured_step": "true", "lora_dropout": "0.1"}
    right = trained(output_dir=tmp_path / "right", **more)
    monkeypatch.setenv("FAILS", fails)
    mine = trained(**more)
    assert right["ran"]["captured_step"] and not mine["ran"]["captured_step"]
    assert mine["measured"]["captured_step"]["off"].startswith(why)
    assert losses(mine) == pytest.approx(losses(right), abs=1e-6) and len(losses(mine)) == 6


@pytest.mark.long
def test_a_run_that_goes_on_after_a_kill_trains_as_one_in_a_piece(trained, tmp_path, monkeypatch):
    more = {"captured_step": "true", "lora_dropout": "0.1"}
    right = trained(output_dir=tmp_path / "right", **more)
    monkeypatch.setenv("DIES", "1 16")
    assert trained(ends=1, **more)["status"] != "succeeded"
    monkeypatch.delenv("DIES")
    again = trained(**more)
    assert again["interruptions"][0]["step"] == 3 and again["ran"]["captured_step"]
    assert losses(again) == losses(right)
    one, other = (
        tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("right", "run")
    )
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("chooses", ["0", "1"])
def test_processes_on_gpus_of_two_kinds_do_as_the_first_one_does(trained, monkeypatch, chooses):
    monkeypatch.setenv("CHOOSES", chooses)
    assert trained()["ran"]["captured_step"] is (chooses == "0")
