"""A trainer on the fast path on a CPU: plain attention under a block mask replaces the kernels."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import arguments
from torch.nn.functional import scaled_dot_product_attention

from sftlab.config.launch import Launch
from sftlab.config.parser import parse_recipe
from sftlab.data.chat_template import set_template
from sftlab.data.splits import load_splits
from sftlab.data.tiles import TILE
from sftlab.fastpath import selection, varlen_attention
from sftlab.models.loading import load_config, load_tokenizer
from sftlab.runs import checkpoint_manifest
from sftlab.training.building import build_trainer
from sftlab.training.trainer import LabTrainer


def reference_attention(query, key, value, table, scale, window=0, cap=0.0, sinks=None):
    """[tokens, heads, size] under the mask that `tiles` and `window` stand for."""
    tokens, groups = query.shape[0], query.shape[1] // key.shape[1]
    pieces = table[0].flatten(0, 1)
    at = torch.arange(tokens)[:, None]
    owned = (at >= pieces[:, 2]) & (at < torch.minimum(pieces[:, 2] + TILE, pieces[:, 1]))
    start = (owned * pieces[:, 0]).sum(dim=1)
    seen = (at >= at.T) & (start[:, None] == start[None])
    if window:
        seen &= at - at.T < window
    query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    if not cap and sinks is None:
        output = scaled_dot_product_attention(query, key, value, seen, scale=scale)
        return output.transpose(0, 1), None
    scores = query @ key.transpose(1, 2) * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, tokens, 1)], -1)
    weights = scores.softmax(-1)[..., :tokens]
    return (weights.to(value.dtype) @ value).transpose(0, 1), None


def leaking_attention(query, key, value, table, scale, *rest):
    """Causal attention over the whole batch, whatever row a token is of."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    return out.transpose(0, 1), None


def pack_on_a_cpu(monkeypatch: pytest.MonkeyPatch, attention: Callable) -> None:
    """Let packing run on a CPU, with the given attention in place of the kernels."""
    monkeypatch.setattr(varlen_attention, "why_not", lambda layers, longest: None)
    monkeypatch.setattr(varlen_attention, "varlen_attention", attention)


def build(fields: dict[str, str], **more: object) -> LabTrainer:
    """The trainer as recipes/sft.py builds it."""
    launch = Launch.from_environment()
    recipe = parse_recipe(arguments({**fields, **{k: str(v) for k, v in more.items()}}), launch)
    model, args = recipe.model, recipe.training
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision, args)
    set_template(tokenizer, args.chat_template_path)
    config = load_config(model.model_name_or_path, model.model_revision, args)
    fast = selection.choose(recipe, config, launch)
    args.disable_tqdm, args.report_to = True, []
    return build_trainer(recipe, launch, fast, tokenizer, load_splits(recipe.data))


def examples(count: int, longest: int = 90) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        length = int(torch.randint(3, longest, (1,), generator=generator))
        ids = torch.randint(0, 255, (length,), generator=generator).tolist()
        cut = int(torch.randint(1, length - 1, (1,), generator=generator))
        found.append({"input_ids": ids, "labels": [-100] * cut + ids[cut:]})
    return found


def losses_and_gradients(
    trainer: LabTrainer, rows: list[dict]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = trainer.model.train()
    model.zero_grad()
    nats = trainer.token_losses(model, trainer._prepare_inputs(trainer.data_collator(rows)))[0]
    nats.sum().backward()
    return nats.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad
    }


def with_trained_lora(trainer: LabTrainer) -> LabTrainer:
    """LoRA's B is zero at the start, which would leave A without a gradient."""
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return trainer


def train(trainer: LabTrainer, **kwargs: object) -> list[dict]:
    trainer.train(**kwargs)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


FOUR_BITS = {"load_in_4bit": "true", "use_bnb_nested_quant": "true", "bnb_4bit_quant_type": "nf4"}


def assert_continues_exactly(fields: dict[str, str]) -> None:
    """A training that goes on from its third step has the losses and weights of one in a piece."""
    whole = build(fields)
    losses = [entry["loss"] for entry in train(whole)]
    again = build(fields, overwrite="true")
    checkpoint = f"{fields['output_dir']}/checkpoint-3"
    assert [entry["loss"] for entry in train(again, resume_from_checkpoint=checkpoint)] == losses
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


# ---- a run that chose a part of the fast path, and goes on ----


def stop_in_step_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a signal end a training in this process in its second step."""
    step = LabTrainer.training_step

    def told_to_stop(self, *args, **kwargs):
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LabTrainer, "training_step", told_to_stop)


def assert_checkpoints_say(run: Path, part: str, chosen: bool | int, forget: bool) -> None:
    """Checkpoints say what the run has of a part; to `forget` makes them of a time before it."""
    for path in run.glob("checkpoint-*/manifest.json"):
        content = json.loads(path.read_text())["content"]
        assert content["must_match"].pop(part) == chosen
        if forget:
            made = {"sha256": checkpoint_manifest._hash(content), "content": content}
            path.write_text(json.dumps(made))
