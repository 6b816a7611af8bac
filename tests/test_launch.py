"""What the machine cannot run is refused before anything starts.

GPU machines are stood in for by their answers.
"""

import gc
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from sftlab.config.launch import Launch, check_devices, force_single_process


def on(monkeypatch, gpus, capability=(9, 0)):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA Test")


def asks(precision="bf16", strategy="single", processes=1, hides_gpus=False):
    return Launch(precision, strategy, processes, processes, hides_gpus, {})


def test_more_processes_than_gpus_are_refused(monkeypatch):
    on(monkeypatch, 2)
    with pytest.raises(
        ValueError,
        match="starts 8 processes on this machine, which shows 2 GPUs: pass --num_processes 2",
    ):
        check_devices(asks(strategy="ddp", processes=8))
    check_devices(asks(strategy="fsdp", processes=2))


@pytest.mark.parametrize(
    ("precision", "capability", "refused"),
    [
        ("fp8", (8, 0), True),
        ("fp8", (8, 9), False),
        ("bf16", (7, 5), True),
        ("bf16", (8, 0), False),
        ("fp16", (7, 5), False),
    ],
)
def test_a_precision_that_the_gpu_lacks_is_refused(monkeypatch, precision, capability, refused):
    on(monkeypatch, 1, capability)
    if refused:
        with pytest.raises(ValueError, match=f"{precision} needs compute capability"):
            check_devices(asks(precision))
    else:
        check_devices(asks(precision))


@pytest.mark.parametrize("script", ["recipes/sft.py", "benchmarks/throughput_worker.py"])
@pytest.mark.parametrize("processes, seen", [("1", "3"), ("2", "3,5")])
def test_no_library_is_imported_before_one_process_sees_one_device(script, processes, seen):
    look = "import os, sys; sys.modules['torch'] = None; sys.argv = [sys.argv[1]]\n"
    look += "try: exec(open(sys.argv[0]).read())\n"
    look += "except ImportError as error: print(error.name, os.environ['CUDA_VISIBLE_DEVICES'])"
    variables = {
        "WORLD_SIZE": processes,
        "RANK": "0",
        "LOCAL_RANK": "0",
        "CUDA_VISIBLE_DEVICES": "3,5",
    }
    command = [sys.executable, "-c", look, script]
    found = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True
    )
    # a slow machine says before that it waits for the libraries
    assert found.stdout.splitlines()[-1].split() == ["torch", seen], found.stderr


def test_one_process_sees_one_device_and_no_process_group(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    force_single_process(asks())
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    assert "LOCAL_RANK" not in os.environ
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    force_single_process(asks(strategy="ddp", processes=2))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"


def test_the_environment_of_accelerate_is_read(monkeypatch):
    for name in (
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "ACCELERATE_USE_FSDP",
        "ACCELERATE_MIXED_PRECISION",
    ):
        monkeypatch.delenv(name, raising=False)
    assert Launch.from_environment().precision is None
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (Launch.from_environment().precision, Launch.from_environment().strategy) == (
        "fp32",
        "ddp",
    )
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert Launch.from_environment().strategy == "fsdp"


def test_garbage_is_collected_again_once_the_libraries_are_imported():
    gc.unfreeze()
    sys.modules.pop("sftlab.startup.preload", None)
    import sftlab.startup.preload  # noqa: F401

    assert gc.isenabled() and gc.get_freeze_count() > 0
    gc.unfreeze()
