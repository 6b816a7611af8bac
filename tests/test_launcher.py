"""sft.py launches itself: the training's sentence is the last line and its status the command's."""

import subprocess
import sys

import fork_server
import pytest
from conftest import ROOT, arguments, launch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from sftlab.config import launch as launch_module
from sftlab.config.launch import Launch, exported
from sftlab.startup.launcher import (
    LAUNCHED,
    launch_as_asked,
    reported_to_launcher,
    status_of,
    take_flags,
)

CONFIGS = ROOT / "accelerate_configs"


def start(config, fields):
    command = [fork_server.python(), str(ROOT / "recipes" / "sft.py")]
    command += ["--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml")]
    return subprocess.Popen(
        [*command, *arguments(fields)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_every_script_that_imports_the_launcher_launches_itself():
    scripts = [*ROOT.glob("recipes/*.py"), *ROOT.glob("eval/*.py"), *ROOT.glob("app/*.py")]
    words = "import sftlab.startup.launcher"
    found = {script.name for script in scripts if words in script.read_text(encoding="utf-8")}
    assert found == set(LAUNCHED)


def test_the_launchers_flags_are_taken_out_of_the_scripts_arguments():
    words = ["--config", "a.yaml", "--num_processes", "4", "--config_file=b.yaml", "--lora_r", "8"]
    rest, flags = take_flags(words)
    assert rest == ["--config", "a.yaml", "--lora_r", "8"]
    assert flags == {"num_processes": "4", "config_file": "b.yaml"}
    with pytest.raises(SystemExit, match="--config_file needs a value"):
        take_flags(["--config_file"])
    with pytest.raises(SystemExit, match="--config_file is given twice"):
        take_flags(["--config_file", "a.yaml", "--config_file=b.yaml"])


def test_without_a_launch_config_or_under_a_launcher_nothing_is_launched(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    launch_as_asked("sft.py", ["--config", "a.yaml"])
    with pytest.raises(SystemExit, match=r"error: .*nowhere\.yaml"):
        launch_as_asked("sft.py", ["--config_file", "nowhere.yaml"])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    launch_as_asked("sft.py", ["--config_file", "nowhere.yaml"])


@pytest.mark.parametrize("flags", [{}, {"num_processes": "1"}, {"mixed_precision": "fp16"}])
@pytest.mark.parametrize("config", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_the_variables_are_accelerates(config, flags, monkeypatch):
    found = exported(CONFIGS / f"{config}.yaml", flags)
    monkeypatch.setattr(launch_module, "_of_one_process", lambda *_: None)
    assert found == exported(CONFIGS / f"{config}.yaml", flags)


@pytest.mark.parametrize("kind", ["'NO'", "MULTI_GPU"])
def test_an_unquoted_no_is_a_precision(kind, tmp_path):
    path = tmp_path / "launch.yaml"
    others = "num_machines: 1\nnum_processes: 1\nuse_cpu: true\nsame_network: true\n"
    path.write_text(f"distributed_type: {kind}\nmixed_precision: no\n{others}")
    assert exported(path)["ACCELERATE_MIXED_PRECISION"] == "no"


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"num_processes": "0"}, "--num_processes 0: expected a whole number"),
        ({"num_processes": "two"}, "--num_processes two: expected a whole number"),
        ({"num_machines": "2"}, "2 machines cannot share 1 process"),
    ],
)
def test_counts_that_cannot_be_are_refused(flags, why):
    with pytest.raises(ValueError, match=why):
        exported(CONFIGS / "cpu.yaml", flags)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("switch", ["true", "'yes'"])
def test_use_cpu_hides_the_gpus(switch, processes, tmp_path):
    path = tmp_path / "launch.yaml"
    counts = f"num_machines: 1\nnum_processes: {processes}\n"
    path.write_text(f"distributed_type: MULTI_GPU\n{counts}use_cpu: {switch}\n")
    assert Launch.from_environment(exported(path)).hides_gpus
    assert not Launch.from_environment(exported(path, {"gpu_ids": "0,1"})).hides_gpus


@pytest.mark.parametrize(
    ("kind", "said"),
    [("MULTI_CPU", "under MPI alone: use accelerate_configs/cpu_ddp"), ("'NO'", "one process")],
)
def test_several_processes_are_refused_where_they_would_not_start(kind, said, tmp_path):
    path = tmp_path / "launch.yaml"
    path.write_text(f"distributed_type: {kind}\nnum_machines: 1\nnum_processes: 2\n")
    with pytest.raises(ValueError, match=said):
        exported(path)
    assert exported(path, {"num_processes": 1})["WORLD_SIZE"] == "1"


def test_one_process_starts_without_accelerate(tmp_path):
    config = CONFIGS / "cpu.yaml"
    words = f"sys.argv = ['sft.py', '--config_file', {str(config)!r}, '--lora_r', '8']"
    start = f"import sys; {words}; import sftlab.startup.launcher, os; "
    start += "print(sys.argv[1:], os.environ['ACCELERATE_MIXED_PRECISION'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", start], text=True, capture_output=True, cwd=ROOT)
    assert done.stdout == "['--lora_r', '8'] no False\n"


@pytest.mark.parametrize(
    ("codes", "status"), [([1], 1), ([2, 1], 1), ([2, 143], 143), ([-9], 137), ([1, -15], 143)]
)
def test_the_statuses_of_the_ranks_are_one(codes, status):
    assert status_of(codes) == status


@pytest.mark.parametrize("config", ["cpu", "cpu_ddp"])
def test_a_refusal_is_the_only_line(config, fields):
    launched = start(config, {**fields, "lora_r": "0"})
    _, said = launched.communicate(timeout=200)
    assert launched.returncode == 1
    assert said == "error: lora_r is 0: the rank must be 1 or more\n"


def test_torchs_launcher_reports_the_trainings_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit), reported_to_launcher():
        sys.exit("error: lora_r is 0")
    failure = ProcessFailure(0, 1, 1, str(tmp_path / "error.json"))
    assert "traceback : error: lora_r is 0\n" in str(ChildFailedError("sft.py", {0: failure}))


def test_accelerate_launch_ends_with_the_sentence(fields):
    said = launch("cpu", {**fields, "lora_r": "0"}).stderr.splitlines()
    assert said[0] == "error: lora_r is 0: the rank must be 1 or more"
    assert said[-2] == "  traceback : error: lora_r is 0: the rank must be 1 or more"


def test_ctrl_c_before_the_training_is_one_line_and_130():
    press = "import os, signal, sys, time; sys.argv = ['sft.py']\n"
    press += (
        "signal.signal(2, signal.default_int_handler)\n"  # a test run in the background is deaf
    )
    press += "import sftlab.startup.launcher; os.kill(os.getpid(), 2); time.sleep(9)"
    done = subprocess.run([sys.executable, "-c", press], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == "\nstopped by Ctrl-C before the training: nothing was written\n"
