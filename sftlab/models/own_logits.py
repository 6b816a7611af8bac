"""Is a loss computed without whole logits the model's own?

Some models scale, cap or shift their logits after the head. A fused head that does not know of it
trains another loss, silently. Here a few tokens go through the model's own forward and through the
fused head, and the two are compared before anything is trained or scored.
"""

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from sftlab.models.layers import decoder_of
from sftlab.models.plain_attention import plain_attention

# Names of configs for a factor of the logits, or its inverse, and for their bound.
FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Rows and tokens of the probe: enough for a cap to show, nothing beside a training step.
PROBE = (2, 24)
# Largest difference between equal computations, relative to the largest logit: float32, 16 bits.
SAME_LOGITS = {torch.float32: 1e-4, torch.bfloat16: 2**-6, torch.float16: 2**-9}
# Mean difference of a token's nats between equal computations.
SAME_NATS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


class Changes(NamedTuple):
    """What a model does to its head's product: times `factor`, then bounded by `cap` (0.0: not).

    The bound is cap * tanh(logits / cap).
    """

    factor: float = 1.0
    cap: float = 0.0


NO_CHANGES = Changes()


def logit_changes(model: PreTrainedModel) -> Changes | str:
    """Returns what the model does to its logits after the head, or why that is not known.

    The config's names are only a guess: the model's own logits of a few tokens must be the same.
    The model has not been compiled, sharded or rounded to float8 yet.
    """
    with _probing(model) as ids:
        hidden: list[torch.Tensor] = []
        hook = decoder_of(model).register_forward_hook(
            lambda *call: hidden.append(call[-1].last_hidden_state)
        )
        try:
            logits = model(input_ids=ids, use_cache=False).logits
        finally:
            hook.remove()
        if not hidden:  # some models call a part of their decoder
            hidden = [decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state]
        head = model.get_output_embeddings()
        product = nn.functional.linear(hidden[-1].to(head.weight.dtype), head.weight, head.bias)
    own, product = logits.float(), product.float()
    tolerance = SAME_LOGITS.get(head.weight.dtype, SAME_LOGITS[torch.bfloat16])
    for changes in _candidates(model.config.get_text_config()):
        guess = _changed(product, changes)
        if bool((own - guess).abs().max() <= tolerance * guess.abs().max()):
            return changes
    largest, apart = product.abs().max(), (own - product).abs().max()
    return (
        f"{type(model).__name__} changes its logits after the head "
        f"(by up to {float(apart):.3g} of {float(largest):.3g})"
    )


def _candidates(config: PreTrainedConfig) -> Iterator[Changes]:
    """Give the changes that a config may mean, the likeliest first."""

    def named(names: tuple[str, ...]) -> Iterator[float]:
        found = (getattr(config, name, None) for name in names)
        return (float(one) for one in found if isinstance(one, int | float) and one > 0)

    factors = [1.0, *(f for one in named(FACTORS) for f in (one, 1 / one))]
    caps = [*named(CAPS), 0.0]
    yield from dict.fromkeys(Changes(factor, cap) for factor in factors[::-1] for cap in caps)


def _changed(product: torch.Tensor, changes: Changes) -> torch.Tensor:
    logits = product * changes.factor
    return changes.cap * torch.tanh(logits / changes.cap) if changes.cap else logits


def own_log_probs_if_needed(model: PreTrainedModel) -> str | None:
    """Let trl's fused head give the model's own log-probabilities, where it gives others.

    Returns the difference in a sentence if it was needed. `model` has trl's fused head.
    """
    with _probing(model) as ids:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        own = -torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
        fused = -model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True).log_probs
    apart = (own - fused.float()).abs().mean()
    if bool(apart <= SAME_NATS.get(model.dtype, SAME_NATS[torch.bfloat16])):
        return None
    _give_own_log_probs(model)
    return (
        f"whole logits are computed: {type(model).__name__}'s own loss differs from the fused "
        f"head's by {float(apart):.3g} nats a token"
    )


@contextmanager
def _probing(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    training = model.training
    rows, tokens = PROBE
    # a head may have fewer rows than the embeddings, which image tokens have too
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    words = min(len(one.weight) for one in ends)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(words, (rows, tokens), generator=generator)
    try:
        model.eval()
        # packed attention needs tiles, and may have no kernel where the weights are now
        with torch.no_grad(), plain_attention(model):
            yield ids.to(model.get_input_embeddings().weight.device)
    finally:
        model.train(training)


def _give_own_log_probs(model: PreTrainedModel) -> None:
    fused = model.forward

    def forward(
        self: PreTrainedModel,
        *args: object,
        fused_lm_head: bool = False,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | None = None,
        **kwargs: object,
    ) -> object:
        if not fused_lm_head:
            given = {"labels": labels, "shift_labels": shift_labels}
            given["num_items_in_batch"] = num_items_in_batch
            return fused(*args, **{k: v for k, v in given.items() if v is not None}, **kwargs)
        outputs = fused(*args, **kwargs | {"use_cache": False})
        logits, targets = outputs.logits.float(), shift_labels
        if targets is None:
            logits, targets = logits[:, :-1], labels[:, 1:]
        mask = targets != -100
        log_probs = torch.log_softmax(logits, dim=-1)
        aimed = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        in_loss = torch.where(mask, aimed, 0.0)
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss, extra = -in_loss.sum() / count, getattr(outputs, "aux_loss", None)
        if extra is not None:
            weight = getattr(self.config.get_text_config(), "router_aux_loss_coef", 0.0)
            loss = loss + weight * extra
        with torch.no_grad():
            entropy = -(log_probs.exp() * log_probs).sum(-1).masked_fill(~mask, 0.0)
            is_top1 = (aimed >= log_probs.amax(-1)) & mask
        return FusedCausalLMOutput(
            loss=loss,
            log_probs=in_loss,
            entropy=entropy,
            is_top1=is_top1,
            label_mask=mask,
            aux_loss=extra,
        )

    model.forward = types.MethodType(forward, model)
