"""Plain PyTorch LoRA fine-tuning without peft, trl or accelerate:

the yardstick for the trainer's losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

IGNORED = -100

Adapter = dict[str, tuple[Tensor, Tensor]]
Fault = Literal[
    "unshifted_loss",
    "loss_on_prompt",
    "end_token_left_out",
    "accumulation_not_divided",
    "mean_of_means",
    "scale_forgotten",
]


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of one run.

    `batch_size` is in rows per micro-batch, `max_length` in tokens.
    """

    batch_size: int
    accumulation: int
    steps: int
    warmup_steps: int
    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    max_length: int
    lora_alpha: float
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8


@dataclass
class Curve:
    """Per optimizer step: loss in nats per token, gradient norm before clipping, learning rate
    used.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Example:
    """Token ids of one row and its labels, both of length (tokens,); labels are not shifted."""

    ids: list[int]
    labels: list[int]


class LoraLinear(nn.Module):
    """y = W x + scale * B A x with W frozen; A is (r, in) and B is (out, r)."""

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(a.clone())
        self.b = nn.Parameter(b.clone())
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return self.base(x) + self.scale * (x @ self.a.T @ self.b.T)


def build_model(
    config: LlamaConfig,
    state: dict[str, Tensor],
    adapter: Adapter,
    alpha: float,
    fault: Fault | None,
) -> LlamaForCausalLM:
    """Load the frozen base weights and wrap every layer named in `adapter`."""
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    model.requires_grad_(False)
    for name, (a, b) in adapter.items():
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        scale = 1.0 if fault == "scale_forgotten" else alpha / a.shape[0]
        setattr(parent, leaf, LoraLinear(getattr(parent, leaf), a, b, scale))
    return model.train()


def encode(row: dict[str, Any], tokenizer: Any, max_length: int, fault: Fault | None) -> Example:
    """Spell out the instruction format for one row.

    Only the response and its end token are labelled.
    """
    question, answer = row["prompt"][0]["content"].strip(), row["completion"][0]["content"].strip()
    prompt = f"{tokenizer.bos_token}### Instruction:\n{question}\n\n### Response:\n"
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    response_ids = tokenizer.encode(answer, add_special_tokens=False) + [tokenizer.eos_token_id]
    response_labels = list(response_ids)
    if fault == "end_token_left_out":
        response_labels[-1] = IGNORED
    prompt_labels = list(prompt_ids) if fault == "loss_on_prompt" else [IGNORED] * len(prompt_ids)
    return Example(
        (prompt_ids + response_ids)[:max_length], (prompt_labels + response_labels)[:max_length]
    )


def pad(examples: list[Example], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Right-pad to ids, attention mask and labels, each (rows, longest)."""
    longest = max(len(e.ids) for e in examples)
    gaps = [longest - len(e.ids) for e in examples]
    ids = [e.ids + [pad_id] * gap for e, gap in zip(examples, gaps, strict=True)]
    mask = [[1] * len(e.ids) + [0] * gap for e, gap in zip(examples, gaps, strict=True)]
    labels = [e.labels + [IGNORED] * gap for e, gap in zip(examples, gaps, strict=True)]
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(labels)


def align(logits: Tensor, labels: Tensor, fault: Fault | None) -> tuple[Tensor, Tensor]:
    """Pair the logits (rows, tokens, vocab) at position t with the label (rows, tokens) at position
    t + 1.
    """
    if fault == "unshifted_loss":
        return logits, labels
    return logits[:, :-1], labels[:, 1:]


def summed_loss(logits: Tensor, labels: Tensor, fault: Fault | None) -> tuple[Tensor, int]:
    """Cross-entropy summed over the labelled tokens, in nats, and how many tokens those are."""
    logits, labels = align(logits, labels, fault)
    kept = labels != IGNORED
    chosen, targets = logits[kept], labels[kept]
    picked = chosen.gather(1, targets.unsqueeze(1)).squeeze(1)
    return (torch.logsumexp(chosen, dim=1) - picked).sum(), int(kept.sum())


def accumulate(
    model: nn.Module, micro_batches: list[list[Example]], pad_id: int, fault: Fault | None
) -> float:
    """Back-propagate one global batch, micro-batch by micro-batch, and return its loss per response
    token.
    """
    global_tokens = sum(
        label != IGNORED for batch in micro_batches for e in batch for label in e.labels[1:]
    )
    loss = 0.0
    for batch in micro_batches:
        ids, mask, labels = pad(batch, pad_id)
        summed, tokens = summed_loss(
            model(input_ids=ids, attention_mask=mask).logits, labels, fault
        )
        if fault == "accumulation_not_divided":
            part = summed / tokens
        elif fault == "mean_of_means":
            part = summed / tokens / len(micro_batches)
        else:
            part = summed / global_tokens
        part.backward()
        loss += part.item()
    return loss


def clip(parameters: list[nn.Parameter], limit: float) -> float:
    """Scale all gradients so that their joint L2 norm is at most `limit`.

    Return the norm from before.
    """
    norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in parameters))
    factor = min(1.0, limit / (norm + 1e-6))
    for p in parameters:
        p.grad.mul_(factor)
    return norm


def schedule(step: int, settings: Settings) -> float:
    """Learning rate of optimizer step `step` (from 0):

    linear from 0 to the peak, then linear to 0.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    return (
        settings.learning_rate * (settings.steps - step) / (settings.steps - settings.warmup_steps)
    )


def global_batches(examples: list[Example], settings: Settings) -> Iterator[list[list[Example]]]:
    """Walk the rows in order, epoch after epoch.

    The last global batch of an epoch may be smaller.
    """
    size, per_step = settings.batch_size, settings.batch_size * settings.accumulation
    while True:
        for start in range(0, len(examples), per_step):
            rows = examples[start : start + per_step]
            yield [rows[i : i + size] for i in range(0, len(rows), size)]


def train(
    model: LlamaForCausalLM,
    rows: list[dict[str, Any]],
    tokenizer: Any,
    settings: Settings,
    fault: Fault | None = None,
) -> Curve:
    """Run `settings.steps` optimizer steps on the LoRA weights of `model`."""
    examples = [encode(row, tokenizer, settings.max_length, fault) for row in rows]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, betas=settings.betas, eps=settings.epsilon, weight_decay=settings.weight_decay
    )
    curve = Curve()
    batches = global_batches(examples, settings)
    for step in range(settings.steps):
        learning_rate = schedule(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.zero_grad()
        curve.losses.append(accumulate(model, next(batches), tokenizer.pad_token_id, fault))
        curve.grad_norms.append(clip(parameters, settings.max_grad_norm))
        curve.learning_rates.append(learning_rate)
        optimizer.step()
    return curve
