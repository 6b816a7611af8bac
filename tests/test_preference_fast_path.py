"""The fast path of preference tuning: what trl computes, from packed sides without whole logits."""

from functools import partial

import pytest
import torch
from conftest import pair_rows, read, write_jsonl
from packed_training import (
    build,
    leaking_attention,
    pack_on_a_cpu,
    reference_attention,
    train,
    with_trained_lora,
)
from preference_runs import pair_fields, stop_in_the_second_step
from tiny_base import write_base_of
from torch.overrides import TorchFunctionMode

from sftlab.config.preference_fields import LOSSES, MICRO_BATCH_LOSSES
from sftlab.data.encoded_pairs import IDS
from sftlab.fastpath import fused_loss
from sftlab.models.own_logits import Changes
from sftlab.runs.run_directory import adapter_hash

FAST = {"packing": "true", "fused_loss": "true"}
PLAIN = {"packing": "false", "fused_loss": "false"}


@pytest.fixture
def packed_with(monkeypatch):
    """Let packing run on a CPU, with the given attention in place of the kernels."""
    return partial(pack_on_a_cpu, monkeypatch)


@pytest.fixture
def pairs(base, tmp_path):
    """Fields of a preference training of four steps, over sides of many lengths."""
    rows = pair_rows(60)
    for number, row in enumerate(rows):
        row["rejected"] += " Or not." * (number % 5)
    return pair_fields(base, write_jsonl(tmp_path / "pairs.jsonl", rows), tmp_path / "run")


def step_of(trainer, rows):
    """Loss, gradients and metrics of a micro-batch."""
    model = trainer.model.train()
    model.zero_grad()
    loss = trainer.compute_loss(model, trainer.data_collator(rows))
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return float(loss.detach()), gradients, {n: v[-1] for n, v in trainer._metrics["train"].items()}


@pytest.mark.parametrize(
    ("packing", "fused", "losses"),
    [(True, True, LOSSES), (True, False, ["sigmoid"]), (False, True, ["sigmoid"])],
)
def test_every_loss_and_its_gradients_are_trls_own(
    pairs, packed_with, monkeypatch, packing, fused, losses
):
    packed_with(reference_attention)
    monkeypatch.setattr(fused_loss, "CHUNK", 50)
    switches = {"packing": str(packing).lower(), "fused_loss": str(fused).lower()}
    fast = with_trained_lora(build(pairs | switches, ld_alpha=0.7))
    plain = with_trained_lora(build(pairs | PLAIN, ld_alpha=0.7))
    assert (fast.fast.packing, fast.fast.fused_loss) == (packing, fused)
    assert (plain.fast.packing, plain.fast.fused_loss) == (False, False)
    rows = [plain.train_dataset[n] for n in range(4)]
    for name in losses:
        for one in (fast, plain):
            one.loss_types, one.label_smoothing = [name], 0.1
        loss, gradients, metrics = step_of(fast, rows)
        expected, right, trls = step_of(plain, rows)
        assert (name, loss) == (name, pytest.approx(expected, abs=1e-5, rel=1e-5))
        assert metrics == pytest.approx(trls, abs=1e-4, rel=1e-5)
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(gradient, right[parameter], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gemma2", {"final_logit_softcapping": 2.0, "head_dim": 16}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.0625}),
    ],
)
def test_log_probabilities_of_a_capped_or_scaled_head_are_trls_own(
    pairs, packed_with, monkeypatch, tmp_path, family, settings
):
    packed_with(reference_attention)
    monkeypatch.setattr(fused_loss, "CHUNK", 50)
    monkeypatch.setattr(fused_loss, "_MEANS_AT_ONCE", 7)
    own = pairs | {"model_name_or_path": str(write_base_of(family, tmp_path, **settings))}
    fast, plain = (with_trained_lora(build(own | switches)) for switches in (FAST, PLAIN))
    assert (fast.fast.packing, fast.fast.fused_loss) == (True, True)
    rows = [plain.train_dataset[n] for n in range(4)]
    loss, gradients, metrics = step_of(fast, rows)
    expected, right, trls = step_of(plain, rows)
    assert loss == pytest.approx(expected, abs=1e-5, rel=1e-5)
    assert metrics == pytest.approx(trls, abs=1e-4, rel=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, right[name], atol=1e-5, rtol=1e-3)


def test_the_mean_of_a_frozen_head_is_computed_once(pairs):
    trainer = build(pairs | {"fused_loss": "true", "packing": "false"})
    rows, head = [trainer.train_dataset[n] for n in range(4)], trainer._base.lm_head
    step_of(trainer, rows)
    before = step_of(trainer, rows)[2]["logits/chosen"]
    with CountedMeans() as counted:
        step_of(trainer, rows)
    assert counted.of(head.weight) == 0
    with torch.no_grad():
        head.weight.mul_(3.0)
    assert step_of(trainer, rows)[2]["logits/chosen"] == pytest.approx(3 * before, rel=1e-4)


class CountedMeans(TorchFunctionMode):
    """Counts the means that are taken of whole tensors."""

    def __init__(self):
        super().__init__()
        self.taken = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.mean:
            self.taken.append(args[0])
        return function(*args, **(kwargs or {}))

    def of(self, tensor):
        return sum(one is tensor for one in self.taken)


def test_a_packed_side_sees_no_other(pairs, packed_with):
    packed_with(reference_attention)
    trainer = with_trained_lora(build(pairs | FAST))
    rows = [trainer.train_dataset[n] for n in range(4)]
    before = torch.stack(trainer.side_log_probs(trainer.model, trainer.data_collator(rows)))
    rows[1] = rows[1] | {"rejected_ids": [(n + 1) % 255 for n in rows[1]["rejected_ids"]]}
    after = torch.stack(trainer.side_log_probs(trainer.model, trainer.data_collator(rows)))
    others = torch.ones(2, 4, dtype=torch.bool)
    others[1, 1] = False
    torch.testing.assert_close(after[others], before[others], atol=1e-5, rtol=0)
    assert abs(after[1, 1] - before[1, 1]) > 1e-3


def test_packed_training_follows_the_plain_curve(pairs, packed_with):
    packed_with(reference_attention)
    found = {}
    for name, switches in (("fast", FAST), ("plain", PLAIN)):
        trainer = build(pairs | switches, per_device_train_batch_size=2, eval_strategy="epoch")
        found[name] = train(trainer), trainer.validation()
    for fast, plain in zip(found["fast"][0], found["plain"][0], strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "num_tokens"):
            assert fast[key] == pytest.approx(plain[key], abs=2e-4, rel=1e-3), key
    assert found["fast"][1] == pytest.approx(found["plain"][1], abs=1e-4)


def test_micro_batches_of_packed_pairs_have_about_as_many_tokens(pairs, packed_with):
    packed_with(reference_attention)
    trainer = build(pairs | FAST, per_device_train_batch_size=2)
    order = list(trainer._get_train_sampler())[:8]
    tokens = [sum(len(trainer.train_dataset[n][side]) for side in IDS) for n in order]
    dealt = sorted(sum(tokens[n : n + 2]) for n in range(0, 8, 2))
    by_size = sorted(tokens)
    assert dealt == sorted(by_size[n] + by_size[7 - n] for n in range(4))


def test_a_run_whose_log_probabilities_are_not_trls_stops(pairs, packed_with, monkeypatch):
    packed_with(leaking_attention)
    with pytest.raises(RuntimeError, match=r"differ by [\d.]+ nats a token .* --packing false"):
        train(build(pairs | FAST))
    packed_with(reference_attention)
    add = fused_loss.add_frozen_head_log_probs
    monkeypatch.setattr(
        "sftlab.training.preference_trainer.add_frozen_head_log_probs",
        lambda model, changes: add(model, Changes(factor=1.1)),
    )
    with pytest.raises(RuntimeError, match="other log-probabilities than trl"):
        train(build(pairs | {"fused_loss": "true"}))


def test_what_the_fused_head_cannot_give_is_left_to_trl(pairs):
    assert build(pairs).fast.fused_loss
    weighted = build(pairs, use_weighting="true")
    assert not weighted.fast.fused_loss
    assert weighted.fast.reasons["fused_loss"] == "use_weighting needs the whole distribution"
    with pytest.raises(ValueError, match="fused_loss is not possible here: use_weighting"):
        build(pairs, use_weighting="true", fused_loss="true")


@pytest.mark.parametrize("loss", MICRO_BATCH_LOSSES)
def test_losses_over_a_micro_batch_are_not_packed(pairs, packed_with, loss):
    packed_with(reference_attention)
    trainer = build(pairs, loss_type=loss)
    assert trainer.fast.reasons["packing"].startswith(f"loss_type {loss} depends on which pairs")
    with pytest.raises(ValueError, match=f"packing is not possible here: loss_type {loss}"):
        build(pairs | FAST, loss_type=loss)


@pytest.mark.long
def test_compiled_layers_are_a_few_graphs_and_train_the_same(
    pairs, finished, packed_with, monkeypatch
):
    packed_with(reference_attention)
    graphs, compile_ = [], torch.compile

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    more = {"backend": compiler, "fullgraph": True}
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: compile_(f, **kwargs | more))
    own = pairs | FAST | {"adapter_name_or_path": str(finished[0])}
    found = []
    for switch in ("true", "false"):
        torch._dynamo.reset()
        trainer = build(own, compile_layers=switch, per_device_train_batch_size=2)
        found.append([entry["loss"] for entry in train(trainer)])
    assert len(graphs) == 4, "layers and the last norm, with gradients and without"
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.long
def test_a_packed_run_continues_bit_for_bit(
    pairs, finished, tmp_path, packed_with, monkeypatch, train_here, trained_here
):
    packed_with(reference_attention)
    own = pairs | FAST | {"adapter_name_or_path": str(finished[0])}
    own |= {"per_device_train_batch_size": "2"}
    trained_here(own | {"output_dir": str(tmp_path / "whole")})
    stop_in_the_second_step(own, monkeypatch, train_here)
    trained_here(own)
    assert read(tmp_path / "run")["losses"] == read(tmp_path / "whole")["losses"]
    assert adapter_hash(tmp_path / "run") == adapter_hash(tmp_path / "whole")
    assert read(tmp_path / "run")["ran"]["packing"]
