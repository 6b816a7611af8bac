"""The fast path trains the same model: packed rows and fused loss against rows padded one by one.

Everything here runs on a CPU in float32. tests/test_kernels.py compares the kernels with plain
attention."""

import pytest
import torch
from conftest import short_fields
from packed_training import (
    build,
    examples,
    losses_and_gradients,
    pack_on_a_cpu,
    reference_attention,
    train,
    with_trained_lora,
)
from torch.utils._python_dispatch import TorchDispatchMode

from sftlab.data.samplers import BalancedSampler
from sftlab.fastpath import fused_loss


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Let packing run here, with the reference attention."""
    pack_on_a_cpu(monkeypatch, reference_attention)


@pytest.fixture
def fields(base, rows, tmp_path) -> dict[str, str]:
    short = short_fields(base, rows, tmp_path / "run")
    return {**short, "per_device_train_batch_size": "4", "lora_dropout": "0"}


def test_packed_and_fused_gives_the_losses_and_gradients_of_rows_padded_one_by_one(
    fields, on_a_cpu
):
    fast = with_trained_lora(build(fields, packing="true", fused_loss="true"))
    plain = with_trained_lora(build(fields, packing="false", fused_loss="false"))
    assert (fast.fast.packing, fast.fast.fused_loss) == (True, True)
    assert (plain.fast.packing, plain.fast.fused_loss) == (False, False)
    rows = examples(7)
    nats, gradients = losses_and_gradients(fast, rows)
    alone = [losses_and_gradients(plain, [row]) for row in rows]
    torch.testing.assert_close(nats, torch.cat([n for n, _ in alone]), atol=1e-5, rtol=0)
    for name, gradient in gradients.items():
        expected = sum(g[name] for _, g in alone)
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)
        assert torch.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > 0.99999


@pytest.mark.parametrize(("packing", "filled_to"), [("true", 384), ("false", 96)])
def test_batches_are_filled_up_to_the_multiple_that_is_asked_for(
    fields, on_a_cpu, packing, filled_to
):
    rows = examples(7)
    trainers = [build(fields, packing=packing, **more) for more in ({}, {"pad_to_multiple_of": 96})]
    assert trainers[1].data_collator(rows)["input_ids"].shape[1] % filled_to == 0
    usual, filled = (
        losses_and_gradients(with_trained_lora(trainer), rows)[0] for trainer in trainers
    )
    torch.testing.assert_close(usual, filled, atol=1e-5, rtol=0)


def test_a_packed_row_does_not_see_its_neighbours(fields, on_a_cpu):
    trainer = with_trained_lora(build(fields, packing="true"))
    rows = examples(5)
    before = losses_and_gradients(trainer, rows)[0]
    changed = [dict(row) for row in rows]
    changed[2]["input_ids"] = [(i + 1) % 255 for i in rows[2]["input_ids"]]
    changed[2]["labels"] = [
        -100 if label == -100 else (label + 1) % 255 for label in rows[2]["labels"]
    ]
    after = losses_and_gradients(trainer, changed)[0]
    row = trainer.data_collator(rows)["loss_rows"]
    torch.testing.assert_close(after[row != 2], before[row != 2], atol=1e-6, rtol=0)
    assert (after[row == 2] - before[row == 2]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "more", [{}, {"per_device_train_batch_size": 2, "gradient_checkpointing": "true"}]
)
def test_training_packed_follows_the_plain_curve(fields, on_a_cpu, more):
    curves = {}
    for name, switch in (("fast", "true"), ("plain", "false")):
        trainer = build(
            fields, packing=switch, fused_loss=switch, eval_strategy="steps", eval_steps=3, **more
        )
        curves[name] = train(trainer)
        curves[f"{name} held out"] = [
            e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e
        ]
        assert trainer.validation()["validation_loss"] == pytest.approx(
            curves[f"{name} held out"][-1], abs=1e-6
        )
    for fast, plain in zip(curves["fast"], curves["plain"], strict=True):
        for key in ("loss", "grad_norm", "num_tokens"):
            assert fast[key] == pytest.approx(plain[key], abs=2e-4), key
        # trl's are means of the micro-batches' means
        for key in ("mean_token_accuracy", "entropy"):
            assert fast[key] == pytest.approx(plain[key], abs=0.02), key
    assert curves["fast held out"] == pytest.approx(curves["plain held out"], abs=1e-5)
    assert len(curves["fast held out"]) == 2


def test_the_loss_of_an_evaluation_is_the_corpus_s_and_does_not_depend_on_the_batch(fields):
    found = []
    for size in (1, 3, 8):
        trainer = with_trained_lora(build(fields, per_device_eval_batch_size=size))
        found.append(trainer.evaluate()["eval_loss"])
        assert trainer.validation()["validation_loss"] == pytest.approx(found[-1], abs=1e-9)
    nats = [losses_and_gradients(trainer, [row])[0] for row in trainer.eval_dataset]
    exact = sum(n.sum().item() for n in nats) / sum(map(len, nats))
    assert found == pytest.approx([exact] * 3, abs=2e-6)


class Costs(TorchDispatchMode):
    """What a step asks of the device:

    results read back by the host, and the largest tensor over the vocabulary.
    """

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words, self.reads, self.largest_logits = words, [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = str(function)
        if any(op in name for op in ("_local_scalar_dense", "nonzero", "masked_select")):
            self.reads.append(name)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.ndim > 1
                and tensor.shape[-1] == self.words
            ):
                self.largest_logits = max(self.largest_logits, tensor.numel() // self.words)
        return result


def test_a_step_reads_nothing_back_and_holds_one_chunk_of_logits(fields, on_a_cpu, monkeypatch):
    monkeypatch.setattr(fused_loss, "CHUNK", 50)
    costs = {}
    for name, switch in (("fast", "true"), ("trl", "false")):
        trainer = build(fields, packing=switch, fused_loss=switch, logging_steps=100)
        costs[name] = Costs(words=259)
        step = trainer.training_step

        def counted(*args, step=step, seen=costs[name], trainer=trainer, **kwargs):
            if not trainer.first_step.done:  # what runs is checked once a start
                return step(*args, **kwargs)
            with seen:
                return step(*args, **kwargs)

        monkeypatch.setattr(trainer, "training_step", counted)
        trainer.train()
    assert costs["fast"].reads == []
    assert costs["fast"].largest_logits == 50
    assert len(costs["trl"].reads) >= 6 * 2 * 2, (
        "the count sees what trl reads: two metrics a micro-batch"
    )


@pytest.mark.parametrize("micro_batch, processes", [(4, 1), (2, 1), (2, 2)])
def test_a_step_has_the_rows_of_the_plain_order_dealt_evenly(micro_batch, processes):
    lengths = torch.randint(16, 513, (83,), generator=torch.Generator().manual_seed(0)).tolist()
    order = torch.randperm(83, generator=torch.Generator().manual_seed(1)).tolist()[:80]
    dealt = list(BalancedSampler(order, lengths, micro_batch, 8 // micro_batch))
    assert sorted(dealt) == sorted(order)
    for step in range(0, 80, 8):
        assert sorted(dealt[step : step + 8]) == sorted(order[step : step + 8])
        micro_batches = [dealt[i : i + micro_batch] for i in range(step, step + 8, micro_batch)]
        tokens = [sum(lengths[row] for row in rows) for rows in micro_batches]
        assert max(tokens) - min(tokens) <= 512
    plain = sum(abs(_spread(order[i : i + 8], lengths, micro_batch)) for i in range(0, 80, 8))
    even = sum(abs(_spread(dealt[i : i + 8], lengths, micro_batch)) for i in range(0, 80, 8))
    assert even < plain / 2


def _spread(rows: list[int], lengths: list[int], size: int) -> int:
    tokens = [sum(lengths[row] for row in rows[i : i + size]) for i in range(0, len(rows), size)]
    return max(tokens) - min(tokens) if len(tokens) > 1 else len(rows) * 0


def test_a_packed_run_goes_on_in_the_middle_of_an_epoch_as_if_nothing_had_happened(
    fields, on_a_cpu
):
    more = {
        "packing": "true",
        "num_train_epochs": 2,
        "max_steps": -1,
        "lora_dropout": 0.1,
        "save_steps": 29,
    }
    more |= {"global_batch_size": 8, "eval_strategy": "no"}
    undisturbed = build(fields, **more)
    steps = train(undisturbed)
    checkpoint = f"{undisturbed.args.output_dir}/checkpoint-29"
    again = build(fields, **more, overwrite="true")
    assert 29 % (len(steps) // 2), "the checkpoint lies inside an epoch"
    continued = train(again, resume_from_checkpoint=checkpoint)
    assert [e["loss"] for e in continued] == [e["loss"] for e in steps]
    for (name, parameter), other in zip(
        undisturbed.model.named_parameters(), again.model.parameters(), strict=True
    ):
        assert torch.equal(parameter, other), name


def test_the_loss_does_not_depend_on_the_chunk(monkeypatch):
    torch.manual_seed(0)
    hidden, weight = torch.randn(90, 16), torch.randn(37, 16)
    positions, targets = torch.randperm(90)[:50], torch.randint(0, 37, (50,))
    found = []
    for chunk in (7, 4096):
        monkeypatch.setattr(fused_loss, "CHUNK", chunk)
        mine = hidden.clone().requires_grad_()
        nats, entropies, hits = fused_loss.FrozenHeadLoss.apply(mine, weight, positions, targets)
        (nats * torch.arange(50.0)).sum().backward()
        found.append((nats, entropies, hits, mine.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    exact = hidden.clone().requires_grad_()
    log_probs = (exact[positions] @ weight.T).log_softmax(-1)
    (-log_probs.gather(1, targets[:, None])[:, 0] * torch.arange(50.0)).sum().backward()
    nats, entropies, hits, gradient = found[0]
    torch.testing.assert_close(gradient, exact.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(nats, -log_probs.gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(entropies, -(log_probs.exp() * log_probs).sum(-1))
    assert torch.equal(hits.bool(), log_probs.argmax(-1) == targets)
