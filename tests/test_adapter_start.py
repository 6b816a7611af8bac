"""EVA and LoftQ: the adapter begins with what rows or exact weights say, once and everywhere."""

import json
from pathlib import Path

import pytest
import torch
from conftest import launched, read
from datasets import Dataset
from packed_training import build, train
from peft import PeftModel
from safetensors.torch import load_file
from test_lora_start import logits
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from sftlab.data.collator import Collator
from sftlab.evaluation.base_and_tuned import finished_run, load_pair
from sftlab.models import four_bits
from sftlab.training import eva
from sftlab.training.adapter_start import AdapterStart
from sftlab.training.eva import EvaBatches

FOUR = {"load_in_4bit": "true", "bnb_4bit_quant_type": "nf4", "lora_r": "4", "lora_alpha": "16"}
STARTS = {"eva": {"lora_r": "4"}, "loftq": FOUR}


class Begun(TrainerCallback):
    """Keeps the LoRA matrices as they are when the training begins."""

    def __init__(self, model):
        self.model, self.matrices = model, {}

    def on_train_begin(self, args, state, control, **kwargs):
        named = self.model.named_parameters()
        self.matrices = {n: p.detach().clone() for n, p in named if "lora_" in n}


def trained(fields, start, **more):
    """A trainer after its six steps, and the LoRA matrices before the first."""
    trainer = build(fields, init_lora_weights=start, **STARTS[start], **more)
    begun = Begun(trainer.model)
    trainer.add_callback(begun)
    train(trainer)
    return trainer, begun.matrices


def plain_base(fields, start):
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    more = {"quantization_config": four} if start == "loftq" else {}
    plain = AutoModelForCausalLM.from_pretrained(fields["model_name_or_path"], **more)
    four_bits.mend(plain)
    return plain


def inputs_of(fields, trainer, layer):
    """Inputs of a layer of the base model, of all tokens in the loss, [tokens, size]."""
    base, found = plain_base(fields, "eva").eval(), []
    base.get_submodule(layer).register_forward_hook(lambda _, given, __: found.append(given[0][0]))
    for row in trainer.train_dataset:
        with torch.no_grad():
            base(torch.tensor([row["input_ids"]]))
        found[-1] = found[-1][torch.tensor(row["labels"]) != -100]
    return torch.cat(found)


@pytest.mark.parametrize("start", STARTS)
def test_what_is_saved_is_the_trained_model_on_the_plain_base(start, fields, tmp_path):
    trainer, begun = trained(fields, start)
    trainer.save_model(str(tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True and not config["eva_config"]
    assert sorted(config["target_modules"]) == ["o_proj", "q_proj", "v_proj"]
    base = plain_base(fields, start)
    plain = logits(base)
    tuned = PeftModel.from_pretrained(base, tmp_path / "adapter")
    # a training on 4 bits multiplies A and B in bfloat16, and peft loads them for float32
    near = 5e-3 if start == "loftq" else 1e-5
    assert torch.allclose(logits(tuned), logits(trainer.model), atol=near)
    assert not torch.allclose(logits(tuned), plain, atol=0.1), "the training changed nothing"
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), plain)
    now = dict(trainer.model.named_parameters())
    assert not any(torch.equal(now[name], one) for name, one in begun.items())


@pytest.mark.long
def test_eva_begins_with_the_main_directions_of_the_tokens_in_the_loss(fields):
    trainer, begun = trained(fields, "eva")
    facts = trainer.what_ran()["adapter_start"]
    assert facts["batches"] > 1 and facts["loss_tokens"] >= 256 * facts["batches"]
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"):
        name = f"base_model.model.{layer}"
        a = begun[f"{name}.lora_A.default.weight"]
        assert not begun[f"{name}.lora_B.default.weight"].any()
        assert torch.allclose(a @ a.T, torch.eye(4), atol=1e-4)
        found = inputs_of(fields, trainer, layer)
        centred = found - found.mean(0)
        best = torch.linalg.svdvals(centred)[:4].square().sum()
        assert (centred @ a.T).square().sum() > 0.97 * best


def test_loftq_begins_nearer_to_the_exact_weights(fields):
    trainer, begun = trained(fields, "loftq")
    facts = trainer.what_ran()["adapter_start"]
    assert 0.05 < facts["rounding_error"] < 0.15
    assert facts["rounding_error_left"] < 0.85 * facts["rounding_error"]
    exact, rounded = plain_base(fields, "eva"), plain_base(fields, "loftq")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (begun[f"base_model.model.{name}.lora_{one}.default.weight"].float() for one in "AB")
    there = torch.eye(32)  # the rows of a weight are its outputs for the directions of the space
    goal = exact.get_submodule(name)(there)
    with torch.no_grad():
        error = goal - rounded.get_submodule(name)(there)
        left = error - 16 / 4 * (there @ a.T @ b.T)
    assert left.norm() < 0.85 * error.norm()
    best = torch.linalg.svdvals(error)[4:].norm()
    assert left.norm() < 1.02 * best, "no four directions take away more"


@pytest.mark.long
@pytest.mark.parametrize("start", STARTS)
def test_a_continued_run_takes_its_checkpoint_and_begins_no_second_time(start, fields, monkeypatch):
    whole, _ = trained(fields, start)
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    monkeypatch.setattr(AdapterStart, "begin", None)
    again = build(fields, init_lora_weights=start, **STARTS[start], overwrite="true")
    checkpoint = f"{fields['output_dir']}/checkpoint-3"
    assert [entry["loss"] for entry in train(again, resume_from_checkpoint=checkpoint)] == losses
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert again.what_ran()["adapter_start"] == whole.what_ran()["adapter_start"] != {}


@pytest.mark.long
def test_the_rows_that_eva_reads_do_not_depend_on_the_micro_batch(fields, tmp_path):
    found = []
    for size in ("8", "2"):
        own = fields | {"per_device_train_batch_size": size, "output_dir": str(tmp_path / size)}
        found.append(trained(own, "eva")[1])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_training_draws_what_it_draws_without(fields, monkeypatch):
    """The random state stays as it was, whatever peft draws: the dropout is the same."""
    trainer = build(fields, init_lora_weights="eva", lora_r="4")
    monkeypatch.setattr(
        "sftlab.training.adapter_start.begin_with_inputs", lambda *_: {"drawn": torch.rand(1)}
    )
    before = torch.get_rng_state()
    trainer.adapter_start.begin(trainer.model, trainer.train_dataset, trainer.data_collator, 42)
    assert trainer.adapter_start.facts and torch.equal(before, torch.get_rng_state())


@pytest.mark.long
@pytest.mark.parametrize("start", STARTS)
def test_a_run_under_two_processes_is_that_of_one_and_is_evaluated(start, fields, tmp_path):
    own = {**fields, "per_device_train_batch_size": "4", "init_lora_weights": start}
    runs = {config: tmp_path / config for config in ("cpu", "cpu_ddp")}
    for config, folder in runs.items():
        launched(config, own | STARTS[start] | {"output_dir": str(folder)})
    facts = [read(folder)["ran"]["adapter_start"] for folder in runs.values()]
    assert facts[0] == facts[1] != {}
    one, two = (load_file(f / "adapter" / "adapter_model.safetensors") for f in runs.values())
    # bfloat16 adapters of 4-bit bases are rounded at every step
    near = 0.02 if start == "loftq" else 1e-3
    assert all(torch.allclose(one[name], two[name], atol=near) for name in one)
    model = load_pair(runs["cpu"], finished_run(runs["cpu"]))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(plain_base(fields, start)))


def batches(rows, rank):
    return EvaBatches(Dataset.from_list(rows), Collator(0, packed=False), rank, seed=1)


def test_rows_that_are_too_few_for_eva_are_refused():
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}] * 3
    with pytest.raises(
        ValueError, match=r"at least 8 tokens .* lora_r 8, .* the training rows have 6"
    ):
        next(iter(batches(rows, 8)))
    few = iter(batches(rows, 4))
    assert [len(next(few)["input_ids"]) for _ in range(2)] == [3, 128]


def test_directions_that_do_not_settle_are_given_up(monkeypatch):
    monkeypatch.setattr(eva, "MOST_BATCHES", 2)
    rows = batches([{"input_ids": [1] * 300, "labels": [1] * 300}], 4)
    with pytest.raises(ValueError, match=r"after 2 batches .* still change: give a lower lora_r"):
        list(rows)
    assert rows.read == {"batches": 2, "rows": 2, "loss_tokens": 600}


@pytest.mark.parametrize(("start", "rank"), [("eva", 40), ("loftq", 20)])
def test_a_rank_that_a_layer_does_not_have_is_refused(start, rank, fields, train_here):
    done = train_here(fields | {"init_lora_weights": start} | STARTS[start] | {"lora_r": str(rank)})
    assert done.returncode == 1
    assert f"lora_r is {rank}, and init_lora_weights {start} finds only" in done.stderr
    assert (
        "internal error" not in done.stderr
        and not (Path(fields["output_dir"]) / "adapter").exists()
    )
