"""A training that is no longer finite stops at once, and every finite checkpoint outlives it."""

import json
import math

import pytest
import torch
from conftest import read
from packed_training import build
from safetensors.torch import load_file, save_file

from sftlab.runs.checkpoint_manifest import in_order, newest_valid, seal
from sftlab.training.finiteness import MOST_SKIPPED, NotFinite, are_finite
from sftlab.training.trainer import LabTrainer


@pytest.fixture
def spoil(monkeypatch):
    """Change a trainer within one of its steps."""

    def at(step, change):
        whole = LabTrainer.training_step

        def stepping(self, *args, **kwargs):
            loss = whole(self, *args, **kwargs)
            return change(self, loss) if self.state.global_step + 1 == step else loss

        monkeypatch.setattr(LabTrainer, "training_step", stepping)
        return lambda: monkeypatch.setattr(LabTrainer, "training_step", whole)

    return at


def nan_gradients(trainer, loss):
    for parameter in trainer._trained:
        parameter.grad.fill_(float("nan"))
    return loss


def infinite_gradient(trainer, loss):
    trainer._trained[0].grad[0] = float("inf")
    return loss


def nan_weight(trainer, loss):
    trainer._trained[0].data[0] = float("nan")
    return loss


def nan_loss(trainer, loss):
    trainer.finiteness.add_loss(loss * float("nan"))
    return loss


def finite_checkpoints(run):
    found = [load_file(folder / "adapter_model.safetensors") for folder in in_order(run)]
    assert all(value.isfinite().all() for weights in found for value in weights.values())
    return [folder.name for folder in in_order(run)]


def test_nan_gradients_stop_the_run_and_the_same_command_starts_from_what_is_finite(
    fields, tmp_path, spoil, train_here
):
    own = {**fields, "max_steps": "30", "save_steps": "5", "save_total_limit": "2"}
    mended = spoil(12, nan_gradients)
    done = train_here(own)
    assert done.returncode
    assert "Traceback" not in done.stderr
    *_, last = done.stderr.strip().splitlines()
    assert last.startswith("error: the training diverged: the gradient norm of step 12 is not")
    assert "continues from checkpoint-10" in last
    assert "--learning_rate" in last and "--max_grad_norm" in last and "bf16" in last
    record = read(tmp_path / "run")
    assert record["status"] == "failed"
    assert record["reason"].startswith("diverged: the gradient norm of step 12")
    assert finite_checkpoints(tmp_path / "run") == ["checkpoint-5", "checkpoint-10"]
    assert json.loads((tmp_path / "run" / "progress.json").read_text())["step"] == 12
    again = train_here(own)
    assert "starts again from checkpoint-10, which is finite, and may end so again" in again.stderr
    assert "continues from checkpoint-10: 10 steps done of 30, 20 left" in again.stdout
    assert finite_checkpoints(tmp_path / "run") == ["checkpoint-5", "checkpoint-10"]
    mended()
    done = train_here({**own, "learning_rate": "0.001", "resume_anyway": "true"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert finite_checkpoints(tmp_path / "run") == ["checkpoint-25", "checkpoint-30"]


@pytest.mark.parametrize(
    ("change", "more", "said"),
    [
        (infinite_gradient, {"max_grad_norm": "0"}, "the gradient norm of step 4"),
        (nan_loss, {}, "the loss of step 4"),
        (nan_weight, {"logging_steps": "2"}, "a weight|the gradient norm of step 4"),
        (nan_gradients, {"logging_steps": "50", "save_steps": "3"}, "gradient norm of step 4"),
        (nan_gradients, {"logging_strategy": "no", "save_strategy": "no"}, "norm of step 4"),
    ],
)
def test_each_kind_is_seen_before_anything_of_it_is_saved(
    fields, tmp_path, spoil, train_here, change, more, said, monkeypatch
):
    spoil(4, change)
    monkeypatch.setattr("sftlab.training.finiteness.LONGEST_INTERVAL", 8)
    done = train_here({**fields, "max_steps": "12", "save_steps": "3", **more})
    assert done.returncode
    reason = read(tmp_path / "run")["reason"]
    assert any(one in reason for one in said.split("|")), reason
    finite_checkpoints(tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()
    step = json.loads((tmp_path / "run" / "progress.json").read_text())["step"]
    assert step <= 8, "no more than the longest interval"
    if more.get("save_strategy") == "no":
        assert "has no checkpoint yet" in done.stderr


def test_a_step_that_fp16_skips_does_not_count(fields, monkeypatch):
    trainer = build(fields)
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", True)
    trainer.create_optimizer()
    finiteness = trainer.finiteness
    for step in range(1, MOST_SKIPPED):
        trainer.state.global_step = step
        finiteness.add_loss(torch.tensor(math.inf))
        finiteness.set_norm(torch.tensor(math.nan))
        finiteness.on_step_end(trainer.args, trainer.state, trainer.control)
    finiteness.look()
    trainer.state.global_step += 1
    with pytest.raises(NotFinite, match="steps up to step 40 were skipped"):
        finiteness.on_step_end(trainer.args, trainer.state, trainer.control)


def test_states_of_the_optimizer_are_looked_at_before_a_checkpoint(fields):
    trainer = build(fields)
    trainer.create_optimizer()
    parameter = trainer.optimizer.param_groups[0]["params"][0]
    trainer.optimizer.state[parameter] = {"step": 1, "exp_avg_sq": torch.tensor([1.0, math.inf])}
    trainer.state.global_step = 3
    with pytest.raises(NotFinite, match="a state of the optimizer is not finite after step 3"):
        trainer.checkpointer.save(lambda: pytest.fail("it was saved"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_of_every_dtype_are_looked_at(dtype):
    good, codes = torch.ones(3, 2, dtype=dtype), torch.zeros(4, dtype=torch.uint8)
    assert are_finite([good, codes, torch.ones(0), torch.ones(2)])
    for value in (math.nan, math.inf, -math.inf):
        bad = good.clone()
        bad[2, 1] = value
        assert not are_finite([good, bad, codes])
    assert are_finite([])


def test_a_checkpoint_with_a_nan_is_set_aside_for_the_finite_one_before_it(tmp_path):
    facts = {"saved": 0, "train_seconds": 1, "must_match": {}, "hardware": {}}
    for step, value in ((5, 1.0), (10, math.nan)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"lora": torch.tensor([value])}, folder / "adapter_model.safetensors")
        seal(folder, facts | {"step": step})
    found = newest_valid(tmp_path)
    assert found.folder.name == "checkpoint-5"
    assert (
        "adapter_model.safetensors has values that are not finite, in lora" in found.invalid[0][1]
    )
