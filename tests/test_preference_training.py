"""Preference tuning: what it begins from, what it learns, and how it is continued."""

import math
import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT, launched, load_script, pair_rows, read, write_jsonl
from packed_training import build
from preference_runs import pair_fields, stop_in_the_second_step
from safetensors.torch import load_file
from trl import DPOTrainer

from sftlab.config.preference_fields import LOSSES
from sftlab.runs.run_directory import adapter_hash

NO_CHOICE = 0.693147  # log 2: the loss of a pair whose margin is 0


@pytest.fixture
def pairs(base, tmp_path):
    """Fields of a preference training of four steps."""
    rows = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(60))
    return pair_fields(base, rows, tmp_path / "run")


def losses(folder):
    return [loss for _, loss in read(folder)["losses"]]


def test_it_learns_to_prefer_the_chosen_answers(pairs, trained_here):
    trained_here(pairs)
    run = read(pairs["output_dir"])
    found = losses(pairs["output_dir"])
    assert found[0] == pytest.approx(NO_CHOICE, abs=1e-5)
    assert found[-1] < 0.5
    assert run["measured"]["validation_reward_accuracy"] == 1
    assert run["measured"]["validation_reward_margin"] > 0.5
    assert run["ran"]["reference"] == "the base model"


def test_the_reference_is_the_adapter_that_it_starts_from(pairs, finished, trained_here):
    first = finished[0]
    trained_here(pairs | {"adapter_name_or_path": str(first)})
    run = read(pairs["output_dir"])
    assert losses(pairs["output_dir"])[0] == pytest.approx(NO_CHOICE, abs=1e-5)
    assert run["ran"]["reference"] == "the adapter that it started from"
    assert run["started_from"]["adapter"] == str(first / "adapter")
    before, after = (
        load_file(f"{folder}/adapter/adapter_model.safetensors")
        for folder in (first, pairs["output_dir"])
    )
    assert before.keys() == after.keys()
    saved = Path(pairs["output_dir"]) / "adapter"
    assert not [path for path in saved.iterdir() if path.is_dir()], "the reference is not saved"
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_a_larger_beta_stays_closer_to_the_start(pairs):
    assert distance_from_start(pairs, 0.05) > 1.3 * distance_from_start(pairs, 5.0) > 0


def distance_from_start(pairs, beta):
    """Nats by which an answer's log-probability has moved after 24 steps, on average."""
    trainer = build(pairs, beta=beta, max_steps=24)
    trainer.train()
    model = trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(24)])
    now = torch.stack(trainer.side_log_probs(model, batch))
    start = torch.stack(trainer.reference_log_probs(model, batch))
    return float((now - start).abs().mean())


@pytest.mark.long
def test_a_stopped_run_continues_bit_for_bit(
    pairs, finished, tmp_path, monkeypatch, train_here, trained_here
):
    own = pairs | {"adapter_name_or_path": str(finished[0])}
    trained_here(own | {"output_dir": str(tmp_path / "whole")})
    stop_in_the_second_step(own, monkeypatch, train_here)
    trained_here(own)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert adapter_hash(tmp_path / "run") == adapter_hash(tmp_path / "whole")


@pytest.mark.long
def test_two_processes_give_the_losses_of_one(pairs, tmp_path, trained_here):
    trained_here(pairs | {"output_dir": str(tmp_path / "one"), "per_device_train_batch_size": "2"})
    launched("cpu_ddp", pairs | {"output_dir": str(tmp_path / "two")})
    assert read(tmp_path / "two")["ran"]["world_size"] == 2
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


@pytest.fixture
def trainer(pairs):
    """A trainer whose model has moved away from its reference."""
    made = build(pairs)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return made


def loss_of(trainer, rows, beta=0.1):
    trainer.beta = beta
    inputs = trainer.data_collator(rows)
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model.eval(), inputs))
    margin = trainer._metrics["eval"]["rewards/margins"][-1]
    return loss, margin


def test_swapped_pairs_change_the_sign_of_the_margin(trainer):
    rows = [trainer.train_dataset[n] for n in range(4)]
    names = {"chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids"}
    swapped = [{names.get(name, name): value for name, value in row.items()} for row in rows]
    (loss, margin), (other, opposite) = loss_of(trainer, rows), loss_of(trainer, swapped)
    assert abs(margin) > 1e-3
    assert opposite == pytest.approx(-margin, abs=1e-5)
    assert loss != pytest.approx(other, abs=1e-4)


def test_beta_scales_the_margin_and_padding_changes_nothing(trainer):
    rows = [trainer.train_dataset[n] for n in range(4)]
    margin = loss_of(trainer, rows)[1]
    assert loss_of(trainer, rows, beta=0.5)[1] == pytest.approx(5 * margin, rel=1e-4)
    alone = [loss_of(trainer, [row]) for row in rows]
    loss, _ = loss_of(trainer, rows)
    assert sum(one for one, _ in alone) / 4 == pytest.approx(loss, abs=1e-6)
    assert sum(one for _, one in alone) / 4 == pytest.approx(margin, abs=1e-5)


def test_validation_runs_model_and_reference_once_and_logs_means_over_pairs(trainer):
    trainer.eval_dataset = trainer.train_dataset.select(range(5))
    trainer.args.per_device_eval_batch_size, calls, logged = 3, [], []
    trainer.model.register_forward_hook(lambda *_: calls.append(1))
    trainer.log = lambda logs, *_: logged.append(dict(logs))
    found = trainer.validation()
    assert len(calls) == 2 * 2, "two batches, each through the model and its reference"
    trainer.evaluate()
    DPOTrainer.log(trainer, logged[0])
    each = [loss_of(trainer, [row]) for row in trainer.eval_dataset]
    margins = [margin for _, margin in each]
    assert found["validation_reward_margin"] == pytest.approx(sum(margins) / 5, rel=1e-4)
    assert found["validation_loss"] == pytest.approx(sum(loss for loss, _ in each) / 5, rel=1e-5)
    assert logged[0]["eval_rewards/margins"] == pytest.approx(sum(margins) / 5, rel=1e-4)


def test_a_model_that_does_not_begin_as_its_reference_is_refused(trainer):
    inputs = trainer.data_collator([trainer.train_dataset[0]])
    with pytest.raises(RuntimeError, match="the model does not begin as its reference"):
        trainer._refuse_other_reference(trainer.model, inputs)


def test_its_script_becomes_the_training_script(monkeypatch):
    script, became = load_script("recipes/dpo.py"), []
    monkeypatch.setattr(os, "execv", lambda path, words: became.extend(words[1:]))
    script.main(["--config", "r.yaml"])
    assert became == [str(ROOT / "recipes" / "sft.py"), "--method", "dpo", "--config", "r.yaml"]


BETA = 0.1
# each loss where the model is its reference, from its formula
AT_THE_START = {
    **dict.fromkeys(("sigmoid", "robust", "aot", "aot_unpaired", "sigmoid_norm"), math.log(2)),
    **dict.fromkeys(("nca_pair", "bco_pair"), 2 * math.log(2)),
    **dict.fromkeys(("hinge", "apo_zero", "apo_down"), 1.0),
    "ipo": (1 / (2 * BETA)) ** 2,
    "sppo_hard": 2 * (0.5 / BETA) ** 2,
    "discopop": 0.5 * math.log(2) + 0.5,
    # label smoothing 0.001, which stands for 0: 0.5 log(0.5 / (1 - s)) + 0.5 log(0.5 / s)
    "exo_pair": 0.5 * math.log(0.25 / (0.001 * 0.999)),
}


def test_every_loss_begins_where_its_formula_says(pairs):
    trainer = build(pairs | {"beta": str(BETA)})
    rows = [trainer.train_dataset[n] for n in range(4)]
    assert {*AT_THE_START, "sft"} == set(LOSSES)
    for name, expected in AT_THE_START.items():
        trainer.loss_types = [name]
        trainer.args.label_smoothing = trainer.label_smoothing = (
            0.001 if name == "exo_pair" else 0.0
        )
        loss, margin = loss_of(trainer, rows, BETA)
        assert (name, loss) == (name, pytest.approx(expected, rel=1e-4))
        assert margin == pytest.approx(0, abs=1e-5)
    trainer.loss_types = ["sft"]
    inputs = trainer.data_collator(rows)
    log_probs = trainer.side_log_probs(trainer.model, inputs).chosen
    tokens = sum(len(row["chosen_ids"]) - row["prompt_length"] for row in rows)
    assert loss_of(trainer, rows)[0] == pytest.approx(-float(log_probs.sum()) / tokens, rel=1e-4)


def test_weights_of_later_tokens_do_not_make_a_model_differ_from_its_reference(pairs, trained_here):
    trained_here(pairs | {"ld_alpha": "0.5", "max_steps": "1"})
    assert losses(pairs["output_dir"])[0] == pytest.approx(NO_CHOICE, abs=1e-5)


def test_validation_counts_each_pair_once_whatever_the_batch(pairs, trained_here):
    found = []
    for size in ("8", "3"):
        folder = f"{pairs['output_dir']}-{size}"
        more = {"per_device_eval_batch_size": size, "split_fractions": ["0.6", "0.4", "0"]}
        trained_here(pairs | more | {"output_dir": folder})
        measured = read(folder)["measured"]
        names = ("validation_loss", "validation_reward_accuracy", "validation_reward_margin")
        found.append([measured[name] for name in names])
    assert read(folder)["data"]["validation"]["rows"] % 8 and found[0][2] > 0
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_reference_that_is_computed_once_is_that_of_every_step(pairs, trained_here, monkeypatch):
    fields = pairs | {"max_steps": "10"}  # of 8 pairs: more than there are
    calls, forward = [], DPOTrainer.compute_ref_log_probs
    monkeypatch.setattr(
        DPOTrainer,
        "compute_ref_log_probs",
        lambda self, *args: calls.append(1) or forward(self, *args),
    )
    found = {}
    for asked, folder in ((None, "unset"), ("false", "each"), ("true", "once")):
        own = fields | {"output_dir": f"{pairs['output_dir']}-{folder}"}
        trained_here(own | ({"precompute_ref_log_probs": asked} if asked else {}))
        found[folder] = read(own["output_dir"]), len(calls)
        calls.clear()
    assert [run["ran"]["reference_computed"] for run, _ in found.values()] == [
        "once",
        "in every step",
        "once",
    ]
    assert found["each"][1] == 0 < found["unset"][1] == found["once"][1]
    (once, _), (each, _) = found["unset"], found["each"]
    assert [loss for _, loss in once["losses"]] == pytest.approx(
        [loss for _, loss in each["losses"]], abs=1e-5
    )
    for name in ("validation_loss", "validation_reward_margin", "validation_reward_accuracy"):
        assert once["measured"][name] == pytest.approx(each["measured"][name], abs=1e-5)


def test_fused_lora_that_is_asked_for_trains_beside_a_reference_in_every_step(pairs):
    """The reference's forward copies LoRA's matrices anew, before the policy's backward."""
    targets = ["gate_proj", "up_proj", "down_proj", "q_proj"]
    own = pairs | {"lora_target_modules": targets, "precompute_ref_log_probs": "false"}
    found = []
    for switch in ("true", "false"):
        trainer = build(own, fused_lora=switch, overwrite="true")
        assert trainer.fast.fused_lora == (switch == "true") and not trainer.reference_once
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(found[0]) == 4 and found[0] == pytest.approx(found[1], rel=1e-4)


def test_wrong_figures_of_the_reference_stop_the_run(pairs, monkeypatch):
    trainer = build(pairs, precompute_ref_log_probs="true")
    forward = DPOTrainer.compute_ref_log_probs
    monkeypatch.setattr(
        DPOTrainer,
        "compute_ref_log_probs",
        lambda self, *args: tuple(one + 1 for one in forward(self, *args)),
    )
    with pytest.raises(RuntimeError, match="does not begin as its reference"):
        trainer.train()


def test_once_is_where_pairs_are_trained_on_again(pairs):
    args = build(pairs, max_steps=-1, num_train_epochs=1).args
    assert not args.reference_once(100, 8)
    args.num_train_epochs = 2
    assert args.reference_once(100, 8)
    args.max_steps = 12
    assert not args.reference_once(100, 8) and args.reference_once(95, 8)
    assert not args.reference_once(None, 8), "a number that is not known"
    args.ld_alpha = 0.5
    assert not args.reference_once(95, 8)
