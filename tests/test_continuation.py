"""What is interrupted goes on as if nothing had happened: signals, kills, a full disk.

And says what it cost.
"""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, arguments, launch_command, launched, read
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_fastpath import build, train
from transformers import TrainerCallback

from sftlab.config.launch import Launch
from sftlab.config.parser import parse_recipe
from sftlab.files import write_json
from sftlab.runs.checkpoint_manifest import in_order, seal, verify
from sftlab.runs.run_directory import adapter_hash
from sftlab.training import stop_on_signal
from sftlab.training.determinism import compute_deterministically
from sftlab.training.disk_room import NoRoom, is_full
from sftlab.training.stop_on_signal import StopOnSignal, Stopped
from sftlab.training.trainer import LabTrainer
from sftlab.training.upstream_fixes import dtypes_kept


def scalars(run, tag="train/loss"):
    return [
        (e.step, e.value) for e in EventAccumulator(str(run / "tensorboard")).Reload().Scalars(tag)
    ]


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
    ("worker", signal.SIGTERM),
    ("worker", signal.SIGUSR1),
    ("launcher", signal.SIGTERM),
    ("group", signal.SIGINT),
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
        "learning_rate": "0",
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
    assert read(run)["status"] == "failed"
    assert not (run / "checkpoint-6").exists()
    trained_here({**own, "resume_anyway": "true"})
    record = read(run)
    assert record["status"] == "succeeded"
    assert [stop["step"] for stop in record["interruptions"]] == [3, 3]
    assert any("data train fingerprint" in one for one in record["interruptions"][-1]["changed"])


class Room:
    """A disk with so many bytes left."""

    def __init__(self, monkeypatch, left):
        self.left = left
        monkeypatch.setattr(
            "sftlab.training.disk_room.shutil.disk_usage",
            lambda path: SimpleNamespace(free=self.left),
        )


def test_a_disk_too_small_for_one_checkpoint_is_refused_before_the_first_step(fields, monkeypatch):
    trainer = build(fields)
    Room(monkeypatch, 1000)
    with pytest.raises(
        NoRoom, match=r"a checkpoint needs 1\.\d MB and .* has 0\.0 MB left"
    ) as caught:
        trainer.checkpointer.check_room()
    assert is_full(caught.value)


def test_without_room_a_checkpoint_is_skipped_and_the_training_goes_on(fields, monkeypatch, caplog):
    whole = train(build({**fields, "output_dir": fields["output_dir"] + "-whole"}, max_steps=9))
    trainer = build(fields, max_steps=9)
    room = Room(monkeypatch, 1 << 30)

    class Fill(TrainerCallback):
        def on_save(self, *args, **kwargs):
            room.left = 0

    trainer.add_callback(Fill())
    assert [e["loss"] for e in train(trainer)] == [e["loss"] for e in whole]
    assert [folder.name for folder in in_order(trainer.checkpointer.folder)] == ["checkpoint-3"]
    assert [skip.split(":")[0] for skip in trainer.checkpointer.skipped] == ["step 6", "step 9"]
    assert "no checkpoint at step 6: a checkpoint needs 0." in caplog.text
    assert "the last checkpoint is checkpoint-3" in caplog.text


def test_older_checkpoints_give_way_where_the_recipe_lets_them(fields, monkeypatch):
    trainer = build(fields, max_steps=9, save_total_limit=2)
    trainer.checkpointer.room.checkpoint_bytes = lambda: 1 << 20
    left = 5 << 19  # two and a half
    monkeypatch.setattr(
        "sftlab.training.disk_room.shutil.disk_usage",
        lambda path: SimpleNamespace(
            free=left - (len(in_order(trainer.checkpointer.folder)) << 20)
        ),
    )
    train(trainer)
    assert trainer.checkpointer.skipped == []
    assert [folder.name for folder in in_order(trainer.checkpointer.folder)] == [
        "checkpoint-6",
        "checkpoint-9",
    ]


def test_a_disk_that_runs_full_in_the_middle_of_saving_leaves_the_last_checkpoint(
    fields, monkeypatch
):
    trainer = build(fields, max_steps=9)
    state = trainer.meter.state

    def full():
        if trainer.state.global_step == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return state()

    trainer.meter.state = full
    train(trainer)
    assert [folder.name for folder in in_order(trainer.checkpointer.folder)] == [
        "checkpoint-3",
        "checkpoint-9",
    ]
    assert [skip.split(":")[0] for skip in trainer.checkpointer.skipped] == ["step 6"]
    verify(trainer.checkpointer.folder / "checkpoint-9")


def test_the_last_valid_checkpoint_outlives_a_kill_at_any_point_of_saving_the_next(
    fields, monkeypatch
):
    trainer = build(fields, max_steps=6, save_total_limit=1)

    def sealing(*args):
        if trainer.state.global_step == 6:
            raise KeyboardInterrupt
        return seal(*args)

    monkeypatch.setattr("sftlab.training.checkpointing.seal", sealing)
    with pytest.raises(KeyboardInterrupt):
        train(trainer)
    verify(trainer.checkpointer.folder / "checkpoint-3")


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


def test_a_stream_that_has_begun_again_goes_on_where_it_was(fields):
    more = {
        "dataset_streaming": "true",
        "streaming_eval_rows": 10,
        "max_steps": 30,
        "save_steps": 25,
    }
    whole = build(fields, **more)
    losses = [e["loss"] for e in train(whole)]
    assert whole.state.epoch > 1, "the stream has begun again"
    again = build(fields, **more, overwrite="true")
    found = train(again, resume_from_checkpoint=f"{fields['output_dir']}/checkpoint-25")
    assert [e["loss"] for e in found] == losses


def test_a_stream_whose_pass_ends_within_a_step_leaves_those_rows(fields):
    streamed = {
        "dataset_streaming": "true",
        "streaming_eval_rows": 10,
        "max_steps": 30,
        "lora_dropout": 0,
    }
    losses = []
    for micro in (8, 2):
        trainer = build(
            {**fields, "global_batch_size": "8", "per_device_train_batch_size": str(micro)},
            **streamed,
        )
        losses.append([entry["loss"] for entry in train(trainer)])
        assert trainer.state.epoch > 1, "the stream has begun again"
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_stream_of_fewer_rows_than_a_step_takes_fails(fields, tmp_path, train_here):
    own = {"dataset_streaming": "true", "streaming_eval_rows": "10", "global_batch_size": "2000"}
    done = train_here({**fields, **own, "per_device_train_batch_size": "2000"})
    assert (
        "the training ended at step 0 of 6: a pass over the stream has no 2000 rows" in done.stderr
    )
    assert read(tmp_path / "run")["status"] == "failed"


def without_times(history):
    return [
        {k: v for k, v in entry.items() if not k.endswith(("runtime", "_per_second"))}
        for entry in history
    ]


def test_what_adds_up_between_logs_goes_on(fields):
    more = {
        "logging_steps": 4,
        "save_steps": 6,
        "max_steps": 18,
        "lora_dropout": 0.1,
        "save_total_limit": 5,
    }
    whole = build(fields, **more)
    expected = whole.train()
    again = build(fields, **more, overwrite="true")
    found = again.train(resume_from_checkpoint=f"{fields['output_dir']}/checkpoint-6")
    assert found.training_loss == expected.training_loss
    assert without_times(again.state.log_history) == without_times(whole.state.log_history)
    saved = json.loads((again.checkpointer.folder / "checkpoint-6/resume_state-0.json").read_text())
    before, this_start = saved["clock"]["train_seconds"], time.perf_counter() - again.clock._started
    assert again.clock.seconds == pytest.approx(before + this_start, abs=0.01)
    assert before > 0.02
    timed = again.meter.facts(again.flops)["timed_steps"]
    assert timed == 2 + 9, "both starts, each without its warm-up"
    assert again.meter.first_step_s == whole.meter.first_step_s


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


@pytest.mark.parametrize(
    ("processes", "on_a_cpu", "more", "looked_for"),
    [
        (2, True, {}, False),
        (3, True, {}, True),
        (3, False, {}, False),
        (3, False, {"deterministic": "true"}, True),
    ],
)
def test_sums_over_three_processes_keep_their_order(fields, processes, on_a_cpu, more, looked_for):
    launch = Launch("fp32", "ddp", processes, processes, on_a_cpu, {})
    recipe = parse_recipe(arguments({**fields, "global_batch_size": "12", **more}), launch)
    assert recipe.training.ddp_find_unused_parameters is looked_for


def test_loading_leaves_the_dtypes_of_the_parameters():
    model = torch.nn.Linear(2, 2).to(torch.bfloat16)
    before = model.weight.clone()
    with dtypes_kept(model):
        model.float()
    assert model.weight.dtype == torch.bfloat16
    assert torch.equal(model.weight, before)


def test_a_signal_stops_at_once_before_the_training_and_changes_nothing_after_it(handlers):
    stop = StopOnSignal()
    with pytest.raises(Stopped, match="signal 15"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    stop = StopOnSignal()
    stop.on_train_begin(None, None, None)
    stop.on_train_end(None, None, None)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)
    assert stop.agreed == 0


def test_one_of_several_ranks_does_not_leave_before_the_others_know(handlers, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    stop = StopOnSignal()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)
    monkeypatch.setattr("sftlab.training.stop_on_signal.dist.is_initialized", lambda: True)
    monkeypatch.setattr("sftlab.training.stop_on_signal.dist.get_world_size", lambda: 2)
    monkeypatch.setattr("sftlab.training.stop_on_signal.dist.new_group", lambda backend: "all")
    told = []
    monkeypatch.setattr(
        "sftlab.training.stop_on_signal.dist.all_reduce",
        lambda flag, **kwargs: told.append(int(flag)),
    )
    with pytest.raises(Stopped, match="signal 15"):
        stop.on_train_begin(None, None, None)
    assert told == [signal.SIGTERM]


def test_a_second_ctrl_c_stops_at_once_but_one_press_counts_once(handlers, monkeypatch):
    stop = StopOnSignal()
    stop.on_train_begin(None, None, None)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
    monkeypatch.setattr(stop_on_signal, "ONE_PRESS_S", 0.0)
    with pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
