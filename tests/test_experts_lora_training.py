"""Trainings with LoRA on the stacked weights of experts, from the recipe to what is exported."""

import json
import os
import signal

import pytest
import torch
from conftest import load_script, read, short_fields
from packed_training import (
    assert_continues_exactly,
    build,
    examples,
    losses_and_gradients,
    pack_on_a_cpu,
    reference_attention,
    train,
    with_trained_lora,
)
from peft import AutoPeftModelForCausalLM
from peft.tuners import lora
from preference_runs import pair_fields
from tiny_base import write_base_of
from transformers import AutoModelForCausalLM

from sftlab.evaluation.base_and_tuned import answering, finished_run, load_pair
from sftlab.evaluation.start_model import load_start, start_of
from sftlab.fastpath import experts_lora
from sftlab.fastpath.experts_lora import FACTORED, MERGED
from sftlab.fastpath.experts_products import ParamWrapper
from sftlab.runs.run_directory import adapter_hash
from sftlab.training.trainer import LabTrainer

MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ON_EXPERTS = {
    "lora_target_modules": "q_proj",
    "lora_target_parameters": EXPERTS,
    "lora_dropout": "0",
}
PROMPT = torch.arange(60, 90)[None]


@pytest.fixture(scope="session")
def mixture(build_once):
    """The folder of a tiny random Qwen 3 MoE."""
    return build_once("mixture", lambda folder: write_base_of("qwen3_moe", folder, **MIXTURE))


@pytest.fixture
def fields(mixture, rows, tmp_path):
    return short_fields(mixture / "qwen3_moe", rows, tmp_path / "run") | ON_EXPERTS


@pytest.fixture
def on_pefts_path(monkeypatch):
    """Lets trainings add LoRA to the experts' weights as peft does."""
    return lambda: monkeypatch.setattr(experts_lora, "why_not", lambda layer: "a test says so")


def test_a_training_is_pefts_and_the_run_says_how(fields, on_pefts_path):
    fields |= {"save_strategy": "no", "eval_strategy": "no"}
    mine = build(fields)
    losses = [entry["loss"] for entry in train(mine)]
    assert mine.what_ran()["experts_lora"] == FACTORED
    assert "factored_experts_lora" not in mine.fast.reasons
    on_pefts_path()
    plain = build(fields)
    assert [entry["loss"] for entry in train(plain)] == pytest.approx(losses, abs=1e-5)
    assert plain.what_ran()["experts_lora"] == MERGED
    reason = plain.fast.reasons["factored_experts_lora"]
    assert reason == "for 2 of 2 modules of experts: a test says so"
    assert losses[-1] < losses[0] - 0.1
    b = [
        one for name, one in mine.model.named_parameters() if ".experts." in name and "_B." in name
    ]
    assert len(b) == 4 and all(one.any() for one in b)


def test_a_run_without_lora_on_experts_says_nothing_of_it(fields):
    del fields["lora_target_parameters"]
    assert "experts_lora" not in build(fields).what_ran()


def test_packed_rows_are_rows_alone(fields, monkeypatch):
    pack_on_a_cpu(monkeypatch, reference_attention)
    packed, padded = (with_trained_lora(build(fields, packing=on)) for on in ("true", "false"))
    nats, gradients = losses_and_gradients(packed, examples(4))
    other, found = losses_and_gradients(padded, examples(4))
    torch.testing.assert_close(nats, other, atol=1e-4, rtol=1e-4)
    assert all((found[n] - g).norm() <= 1e-3 * g.norm() for n, g in gradients.items())
    fields |= {"max_steps": "1", "packing": "true"}
    assert len(train(build(fields))) == 1, "the check of packed rows passes"


def test_checkpointed_activations_change_nothing(fields):
    found = []
    for more in ({}, {"gradient_checkpointing": "true"}):
        trainer = with_trained_lora(build(fields, **more))
        assert trainer.what_ran()["experts_lora"] == FACTORED
        found.append(losses_and_gradients(trainer, examples(3)))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[1][1][name], one) for name, one in found[0][1].items())


def test_a_training_continues_exactly(fields):
    assert_continues_exactly(fields | {"eval_strategy": "no"})


@pytest.mark.parametrize("goes_on", [False, True])
def test_preferences_are_tuned_as_on_pefts_path(
    fields, mixture, pairs_file, tmp_path, trained_here, on_pefts_path, goes_on
):
    own = pair_fields(mixture / "qwen3_moe", pairs_file, tmp_path / "mine") | ON_EXPERTS
    if goes_on:  # the reference is a second adapter on the same experts
        trained_here(fields)
        own["adapter_name_or_path"] = fields["output_dir"]
    trained_here(own)
    on_pefts_path()
    trained_here(own | {"output_dir": str(tmp_path / "plain")})
    mine, plain = read(tmp_path / "mine"), read(tmp_path / "plain")
    assert [one["ran"]["experts_lora"] for one in (mine, plain)] == [FACTORED, MERGED]
    found, right = ([loss for _, loss in one["losses"]] for one in (mine, plain))
    assert found == pytest.approx(right, abs=1e-4)
    assert found[-1] < 0.5


def test_the_adapter_that_a_run_went_on_from_answers_beside_its_own(fields, tmp_path, trained_here):
    trained_here(fields)
    folder = tmp_path / "again"
    trained_here(fields | {"output_dir": str(folder), "adapter_name_or_path": fields["output_dir"]})
    run = finished_run(folder)
    pair = load_pair(folder, run)
    load_start(pair, start_of(folder, run))
    first = logits(load_pair(tmp_path / "run", finished_run(tmp_path / "run")))
    with answering(pair, "start"):
        assert (logits(pair) - first).norm() < 1e-5 * first.norm()
    assert (logits(pair) - first).norm() > 0.01 * first.norm()


@pytest.fixture
def told_to_stop(monkeypatch):
    """TERM arrives within the fourth step, once."""
    whole, left = LabTrainer.training_step, [4]

    def stepping(self, *args, **kwargs):
        if left == [self.state.global_step + 1]:
            left.clear()
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, *args, **kwargs)

    return lambda: monkeypatch.setattr(LabTrainer, "training_step", stepping)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=PROMPT).logits


def test_a_run_from_its_recipe_to_what_is_exported(
    fields, tmp_path, told_to_stop, train_here, trained_here
):
    trained_here({**fields, "output_dir": str(tmp_path / "whole")})
    told_to_stop()
    assert train_here(fields).returncode
    assert read(tmp_path / "run")["status"] == "interrupted"
    trained_here(fields)
    run = finished_run(tmp_path / "run")
    assert run["ran"]["experts_lora"] == FACTORED and len(run["interruptions"]) == 1
    assert adapter_hash(tmp_path / "run") == adapter_hash(tmp_path / "whole")

    # evaluations take the same path, and answer as plain peft does
    pair = load_pair(tmp_path / "run", run)
    assert sum(isinstance(one, ParamWrapper) for one in pair.modules()) == 2
    adapter = tmp_path / "run" / "adapter"
    plain = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    assert sum(isinstance(one, lora.ParamWrapper) for one in plain.modules()) == 4
    tuned = logits(plain)
    assert (logits(pair) - tuned).norm() < 1e-5 * tuned.norm()
    with answering(pair, "base"), plain.disable_adapter():
        base = logits(plain)
        assert torch.equal(logits(pair), base)
    assert (base - tuned).norm() > 0.01 * tuned.norm()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 258}
    texts = [one.generate(input_ids=PROMPT, **settings).tolist() for one in (pair, plain)]
    assert texts[0] == texts[1]

    merged = tmp_path / "merged"
    script = load_script("recipes/export.py")
    asked = ["--run", str(tmp_path / "run"), "--to", "merged", "--out", str(merged)]
    script.main([*asked, "--prompts", "2"])
    found = logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32))
    assert (found - tuned).norm() < 1e-5 * tuned.norm()
    assert json.loads((merged / "verified.json").read_text())["differs"] is None
