"""FSDP2 over two CPU processes: the training that DDP does, to the last bit, and its continuation."""

import os
import signal
import subprocess

import pytest
from conftest import ROOT, launch, launch_command, read, short_fields

IN_BF16 = ("--mixed_precision", "bf16")


def command(fields):
    typed = launch_command("fsdp", fields, IN_BF16)
    return [word.replace("recipes/sft.py", "tests/fsdp_on_cpu.py") for word in typed]


def launch_fsdp(fields):
    done = subprocess.run(command(fields), capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def sharded(base, rows, tmp_path_factory):
    """Folder and fields of a run whose steps are two micro-batches a process."""
    folder = tmp_path_factory.mktemp("runs") / "fsdp"
    fields = {**short_fields(base, rows, folder), "max_steps": "60", "save_steps": "30", "eval_strategy": "no"}
    fields |= {"per_device_train_batch_size": "2", "lora_dropout": "0.1"}
    launch_fsdp(fields)
    return folder, fields


def test_fsdp_trains_as_ddp_does(sharded, tmp_path):
    folder, fields = sharded
    done = launch("cpu_ddp", {**fields, "output_dir": str(tmp_path / "ddp")}, IN_BF16)
    assert done.returncode == 0, done.stderr[-3000:]
    fsdp, ddp = read(folder), read(tmp_path / "ddp")
    assert (fsdp["ran"]["strategy"], ddp["ran"]["strategy"]) == ("fsdp2", "ddp")
    assert fsdp["ran"] | {"strategy": "ddp"} == ddp["ran"]
    assert (fsdp["ran"]["accumulation"], fsdp["ran"]["gradients_reduced_in"]) == (2, "float32")
    assert fsdp["losses"] == ddp["losses"]
    assert len(fsdp["losses"]) == 60
    assert adapter(folder) == adapter(tmp_path / "ddp")


def test_fsdp_gathers_weights_and_averages_gradients_at_once(sharded):
    record = read(sharded[0])
    talk, trained = record["measured"]["collectives"], record["ran"]["trainable_parameters"]
    assert talk["all_gather"]["calls"] > 0
    assert "reduce_scatter" not in talk, "no gradient of a sharded weight is there to be reduced"
    assert talk["all_reduce"]["mb"] == pytest.approx(trained * 4 / 2**20, abs=2e-3)


def test_fsdp_continues_after_a_kill_as_if_nothing_had_happened(sharded, tmp_path):
    folder, fields = sharded
    again = tmp_path / "again"
    fields = {**fields, "output_dir": str(again), "disable_tqdm": "true"}
    process = subprocess.Popen(command(fields), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    steps = (line for line in process.stdout if "'loss'" in line)
    for _ in range(33):
        next(steps)
    os.kill(read(again)["host_pid"][1], signal.SIGKILL)
    process.wait(120)
    assert read(again)["status"] != "succeeded"
    launch_fsdp(fields)
    assert read(again)["interruptions"]
    assert read(again)["losses"] == read(folder)["losses"]
    assert adapter(again) == adapter(folder)
