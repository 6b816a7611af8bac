"""A training that was stopped or killed continues bit for bit, and says what it cost."""

import os
import re
import shutil
import signal
import subprocess

import pytest
import torch
from conftest import ROOT, launch_command, launched, read
from packed_training import build, train
from training_curves import scalars

from sftlab.files import write_json
from sftlab.runs.checkpoint_manifest import in_order
from sftlab.runs.run_directory import adapter_hash
from sftlab.training.determinism import compute_deterministically
from sftlab.training.trainer import LabTrainer
from sftlab.training.upstream_fixes import dtypes_kept


def stopped_after(fields, step, number=signal.SIGTERM, whom="worker", config="cpu"):
    """Start, signal the training process (or its launcher, or all as Ctrl-C does) at a step, wait
    for the end.
    """
    process = subprocess.Popen(
        launch_command(config, {**fields, "disable_tqdm": "true"}, cold=whom != "worker"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    seen, output = 0, []
    for line in process.stdout:
        output.append(line)
        seen += "'loss'" in line
        if seen == step and "'loss'" in line:
            worker = read(fields["output_dir"])["host_pid"][1]
            if whom == "group":
                for pid in (process.pid, worker):
                    os.kill(pid, number)
            else:
                os.kill(worker if whom == "worker" else process.pid, number)
    process.wait(120)
    return process.returncode, "".join(output)


STOPS = [
    pytest.param("worker", signal.SIGTERM, marks=pytest.mark.long),
    ("worker", signal.SIGUSR1),
    pytest.param("launcher", signal.SIGTERM, marks=pytest.mark.long),
    pytest.param("group", signal.SIGINT, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("whom", "number"), STOPS)
def test_a_stopped_run_is_interrupted_and_continues_bit_for_bit(
    finished, tmp_path, trained_here, whom, number
):
    _, fields, _ = finished
    own = {**fields, "output_dir": str(tmp_path / "run"), "max_steps": "60", "save_strategy": "no"}
    code, output = stopped_after(own, 4, number, whom)
    record = read(own["output_dir"])
    assert record["status"] == "interrupted", output[-3000:]
    assert " at step " in record["reason"]
    assert code != 0
    assert not (tmp_path / "run" / "adapter").exists()
    if (whom, number) != STOPS[0]:
        return
    trained_here({**own, "output_dir": str(tmp_path / "whole")})
    launched("cpu", {**own, "disable_tqdm": "true"})
    record = read(own["output_dir"])
    assert record["status"] == "succeeded"
    (stop,) = record["interruptions"]
    assert (stop["status"], stop["steps_done_again"], stop["seconds_done_again"]) == (
        "interrupted",
        0,
        0.0,
    )
    assert stop["stopped_seconds"] > 0
    assert adapter_hash(own["output_dir"]) == adapter_hash(tmp_path / "whole")
    whole = read(tmp_path / "whole")
    for figure in ("train_loss", "validation_loss"):
        assert record["measured"][figure] == whole["measured"][figure]
    assert record["measured"]["timed_steps"] > 40, "both starts are timed"
    assert scalars(tmp_path / "run") == scalars(tmp_path / "whole")
    assert len(scalars(tmp_path / "run", "train/train_loss")) == 1


def test_a_crashed_run_says_where_continues_from_its_checkpoint_and_says_what_it_cost(
    finished, tmp_path, trained_here
):
    _folder, fields, _ = finished
    own = {
        **fields,
        "output_dir": str(tmp_path / "run"),
        "max_steps": "40",
        "logging_steps": "2",
        "save_steps": "9",
    }
    _, output = stopped_after(own, 8, signal.SIGSEGV)
    assert "Segmentation fault" in output and re.search(r"sft.py\W+ line \d+ in train\b", output)
    assert read(own["output_dir"])["status"] == "running"
    trained_here({**own, "disable_tqdm": "true"})
    record = read(own["output_dir"])
    assert record["status"] == "succeeded"
    (stop,) = record["interruptions"]
    assert (stop["status"], stop["step"]) == ("running", 9)
    assert 7 <= stop["steps_done_again"] < 18
    assert 0 < stop["seconds_done_again"] < 5
    assert record["measured"]["train_seconds"] > record["measured"]["timed_seconds"]
    assert [step for step, _ in scalars(tmp_path / "run")] == list(range(2, 41, 2))
    assert record["measured"]["checkpoints"]["mb"] > 0.05
    assert [folder.name for folder in in_order(tmp_path / "run")] == [
        "checkpoint-36",
        "checkpoint-40",
    ]
    assert not list((tmp_path / "run").rglob("training_args.bin"))


@pytest.fixture
def told_to_stop(monkeypatch):
    """TERM arrives within a step, once."""

    def at(step):
        whole, left = LabTrainer.training_step, [step]

        def stepping(self, *args, **kwargs):
            if left == [self.state.global_step + 1]:
                left.clear()
                os.kill(os.getpid(), signal.SIGTERM)
            return whole(self, *args, **kwargs)

        monkeypatch.setattr(LabTrainer, "training_step", stepping)

    return at


def test_a_stop_is_saved_where_only_better_models_are(
    fields, tmp_path, told_to_stop, train_here, trained_here
):
    best = {
        "save_strategy": "best",
        "metric_for_best_model": "eval_loss",
        "greater_is_better": "false",
    }
    own = {
        **fields,
        **best,
        "max_steps": "6",
        "eval_strategy": "steps",
        "eval_steps": "2",
        "learning_rate": "1e-12",
    }
    told_to_stop(4)
    assert train_here(own).returncode
    assert read(tmp_path / "run")["status"] == "interrupted"
    assert "checkpoint-4" in [folder.name for folder in in_order(tmp_path / "run")]
    trained_here(own)
    assert read(tmp_path / "run")["measured"]["global_step"] == 6


def test_what_was_timed_before_a_stop_counts(fields, tmp_path, told_to_stop, train_here):
    told_to_stop(5)
    assert train_here({**fields, "save_steps": "100"}).returncode
    assert read(tmp_path / "run")["measured"]["timed_steps"] == 4, "all but the warm-up"


@pytest.mark.long
def test_a_stop_in_the_last_step_of_an_epoch_keeps_what_the_epoch_ends_with(
    fields, rows, tmp_path, told_to_stop, train_here, trained_here
):
    own = {
        **fields,
        "num_train_epochs": "2",
        "max_steps": "-1",
        "lora_dropout": "0.1",
        "eval_on_start": "true",
        "eval_strategy": "epoch",
        "logging_strategy": "epoch",
        "save_steps": "100",
    }
    trained_here({**own, "output_dir": str(tmp_path / "whole")})
    whole = read(tmp_path / "whole")["measured"]
    told_to_stop(whole["global_step"] // 2)
    assert train_here(own).returncode
    trained_here(own)
    found = read(tmp_path / "run")
    assert found["interruptions"][0]["step"] == whole["global_step"] // 2
    assert found["measured"]["train_loss"] == whole["train_loss"]
    for tag in ("eval/loss", "train/loss"):
        assert scalars(tmp_path / "run", tag) == scalars(tmp_path / "whole", tag)


def test_other_data_are_refused_with_what_differs_or_continued_with_on_request(
    fields, rows, tmp_path, train_here, trained_here
):
    data = tmp_path / "rows.jsonl"
    shutil.copy(rows, data)
    own = {**fields, "dataset_name": str(data)}
    trained_here(own)
    run = tmp_path / "run"
    write_json(run / "run.json", read(run) | {"status": "interrupted"})
    shutil.rmtree(run / "checkpoint-6")
    data.write_text(data.read_text().replace("Repeat", "Recite"))
    assert re.search(r"data test fingerprint .* was, .* is\)", train_here(own).stderr)
    assert read(run)["status"] == "interrupted", "nothing is written before all is checked"
    assert not (run / "checkpoint-6").exists()
    trained_here({**own, "resume_anyway": "true"})
    record = read(run)
    assert record["status"] == "succeeded"
    assert [stop["step"] for stop in record["interruptions"]] == [3]
    assert any("data train fingerprint" in one for one in record["interruptions"][-1]["changed"])


def test_a_run_killed_after_its_last_step_takes_no_step_more(fields):
    first = build(fields)
    train(first)
    again = build(fields, overwrite="true")
    again.train(resume_from_checkpoint=f"{fields['output_dir']}/checkpoint-6")
    assert again.state.global_step == 6
    for (name, parameter), other in zip(
        first.model.named_parameters(), again.model.parameters(), strict=True
    ):
        assert torch.equal(parameter, other), name
    assert again.first_step.observed == first.first_step.observed


def test_deterministic_training_says_so_and_trains(fields, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    try:
        compute_deterministically()
        trainer = build(fields, deterministic="true", max_steps=2)
        train(trainer)
        assert trainer.what_ran()["deterministic"] is True
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch._inductor.config.deterministic
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch._inductor.config.deterministic = False


def test_loading_leaves_the_dtypes_of_the_parameters():
    model = torch.nn.Linear(2, 2).to(torch.bfloat16)
    before = model.weight.clone()
    with dtypes_kept(model):
        model.float()
    assert model.weight.dtype == torch.bfloat16
    assert torch.equal(model.weight, before)
