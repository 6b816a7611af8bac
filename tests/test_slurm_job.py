"""What a job decides before and after its training, without a Slurm."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, arguments, load_script

from sftlab.config.launch import Launch
from sftlab.config.parser import parse_recipe

CPU = Launch("fp32", "single", 1, 1, True, {})
RECORD = {"recipe": {"model_name_or_path": "x"}, "launch": {}, "template": {"hash": "x"}}


def test_a_studys_jobs_get_what_was_asked_for_it(monkeypatch):
    from sftlab import slurm_job as job

    asked = {
        "JOB_PARTITION": "long",
        "JOB_ACCOUNT": "lab",
        "JOB_QOS": "(null)",
        "MEM_PER_NODE": "4096",
    }
    for name, value in asked.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(
        job, "job_fact", {"TimeLimit": "02:00:00", "TresPerNode": "gres/gpu:h200:2"}.get
    )
    assert job.same_place() == ["--time=02:00:00", "--partition=long", "--account=lab"]
    assert job.same_resources() == ["--mem=4096", "--gres=gpu:h200:2"]
    monkeypatch.setenv("SLURM_GPUS_PER_NODE", "2")
    assert job.same_resources() == ["--gpus-per-node=2", "--mem=4096"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["train", "recipes/none.yaml", "accelerate_configs/cpu.yaml"],
            "recipe recipes/none.yaml not found",
        ),
        (["train", "recipes/demo/attn_r16.yaml", "none.yaml"], "launch config none.yaml not found"),
        (["train", "recipes/demo/attn_r16.yaml"], "usage: sbatch slurm/train.sbatch"),
        (
            ["train", "recipes/demo/attn_r16.yaml", "accelerate_configs/ddp.yaml"],
            "needs GPUs and the job has none",
        ),
        ([], "the sbatch files beside this one start it"),
        (["evaluate", "runs/none"], "runs/none is no run directory"),
        (["study", "recipes/studies/none.yaml"], "none.yaml"),
    ],
)
def test_a_mistake_is_one_sentence(words, said, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        load_script("slurm/job.py").main(words)
    (line,) = str(stopped.value).splitlines()
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.parametrize(
    ("recipe", "asked", "started"),
    [
        ({"method": "sft"}, [], "quality"),
        ({}, [], "quality"),
        ({"method": "dpo"}, [], "preferences"),
        ({"method": "dpo"}, ["quality"], "quality"),
        ("damaged", [], "quality"),
    ],
)
def test_a_run_is_evaluated_by_its_method(recipe, asked, started, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe}))
    job, commands = load_script("slurm/job.py"), []
    monkeypatch.setattr(job, "one_command", lambda words, more_to_do: commands.append(words))
    assert job.main(["evaluate", str(tmp_path), *asked]) == 0
    assert [words[1:] for words in commands] == [[f"eval/{started}.py", "--run", str(tmp_path)]]


SPELLINGS = [
    ["--output_dir", "there"],
    ["--output-dir", "there"],
    ["--output_dir=there"],
    ["--output-dir=there"],
    ["--output_dir", "elsewhere", "--max_steps", "3", "--output-dir=there"],
    ["--split_fractions", "0.8", "0.1", "0.1", "--output-dir", "there", "--max-steps=3"],
]


@pytest.mark.parametrize("words", SPELLINGS)
def test_a_job_and_its_training_agree_on_the_run_directory(words, fields, monkeypatch):
    job = load_script("slurm/job.py")
    recipe = {"output_dir": "of the recipe"}
    assert job.output_dir(recipe, words) == Path("there")
    del fields["output_dir"]
    assert parse_recipe([*arguments(fields), *words], CPU).training.output_dir == "there"
    assert job.output_dir(recipe, [*words, "--seed", "1"]) == Path("there")
    assert job.output_dir(recipe, ["--max_steps", "3"]) == Path("of the recipe")


def test_a_run_directory_that_is_none_is_refused():
    job = load_script("slurm/job.py")
    for recipe, words in (({}, []), ({"output_dir": ["a"]}, []), ({}, ["--output_dir", "a", "b"])):
        with pytest.raises(ValueError, match="output_dir"):
            job.output_dir(recipe, words)


@pytest.mark.parametrize(("trained_by", "trains"), [("7", False), ("6", True), (None, True)])
def test_only_a_run_of_this_very_job_is_done_after_a_restart(
    tmp_path, monkeypatch, trained_by, trains
):
    job, started = load_script("slurm/job.py"), []
    environment = {"JOB_ID": "7", "JOB_NUM_NODES": "1", "RESTART_COUNT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(job, "first_address", lambda: "127.0.0.1")
    by = {"slurm_job": trained_by} if trained_by else {}
    (tmp_path / "run.json").write_text(json.dumps(RECORD | {"status": "succeeded"} | by))

    class Srun:
        asked_to_stop = False

        def __init__(self, command):
            started.append(command)

        def wait(self):
            return 1

    monkeypatch.setattr(job, "under_srun", Srun)
    words = ["recipes/demo/attn_r16.yaml", "accelerate_configs/cpu.yaml"]
    code = job.main(["train", *words, "--output-dir", str(tmp_path)])
    assert (bool(started), code) == (trains, int(trains))


def test_a_lost_node_is_not_a_failed_run(tmp_path, monkeypatch, capsys):
    job = load_script("slurm/job.py")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    (tmp_path / "run.json").write_text(
        json.dumps(RECORD | {"status": "failed", "reason": "no peer"})
    )
    for lost, ended in (([], 1), (["n2"], 99)):
        monkeypatch.setattr(job, "lost_nodes", lambda lost=lost: lost)
        monkeypatch.setattr(job, "wait_for_other_nodes", lambda what: 99)
        assert job.end_of_training(tmp_path / "run.json", 1, True, False) == ended
    assert "no peer" in capsys.readouterr().err


@pytest.mark.parametrize(("ended", "requeued"), [("TOLD_TO_STOP", True), ("FAILED", False)])
def test_a_step_that_was_told_to_stop_before_it_began_is_no_failure(
    tmp_path, monkeypatch, ended, requeued
):
    job = load_script("slurm/job.py")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    monkeypatch.setattr(job, "requeue", lambda what: 99)
    code = getattr(job, ended)
    assert job.TOLD_TO_STOP < job.FAILED < 256
    assert job.end_of_training(tmp_path / "run.json", code, False, False) == (99 if requeued else 1)


def test_processes_follow_the_allocation(monkeypatch):
    job = load_script("slurm/job.py")
    gpu, cpu = (
        {"distributed_type": "MULTI_GPU", "num_processes": 2},
        {"gpu_ids": "-1,-1", "num_processes": 1},
    )
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    assert (job.processes_a_node(gpu), job.processes_a_node(cpu)) == (4, 1)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "3")
    assert (job.processes_a_node(gpu), job.processes_a_node(cpu)) == (4, 3)


def test_shell_scripts_pass_shellcheck():
    checker = shutil.which("shellcheck")
    if checker is None:
        pytest.skip("shellcheck is not installed")
    scripts = [*ROOT.glob("slurm/*.sbatch"), *ROOT.glob("slurm/*.sh")]
    subprocess.run([checker, *map(str, scripts)], check=True)
