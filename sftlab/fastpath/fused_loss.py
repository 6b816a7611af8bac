"""Cross-entropy over a frozen head, which holds one chunk of logits at a time.

A frozen head has no gradient of its own. The gradient of the hidden states can be computed while a
chunk's logits exist: two matrix products per token in all. In fp8 the second of them is in float8;
the logits are not, as rounding the head shifts the loss. Only positions whose next token is in the
loss are computed.
"""

import types
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments
from trl.trainer.utils import FusedCausalLMOutput

from sftlab.fastpath.float8 import BACKWARD, FORWARD, float8_product, to_float8, transpose
from sftlab.models.layers import decoder_of
from sftlab.models.own_logits import NO_CHANGES, Changes

# Positions whose logits exist at one time.
CHUNK = 4096
# Positions whose capped logits exist in float32 at one time, for their means.
_MEANS_AT_ONCE = 128


class Rounded(NamedTuple):
    """A head in float8, for gradients: its weight [size, words], and a scale [1, size]."""

    weight_t: torch.Tensor
    scale: torch.Tensor


class FrozenHeadLoss(torch.autograd.Function):
    """Returns nats, entropies and hits of the chosen positions, [n] each.

    Takes hidden [tokens, size], weight [words, size], positions and targets [n], and what the model
    does to its logits: `bias` [words] or None, `factor`, `cap`. `hits` is 1.0 where the target has
    the highest logit. Only the nats have a gradient, and only with respect to `hidden`; it comes
    out of `rounded` where that is given. `means` [n] in float32, where given, is filled with the
    mean of each position's logits.
    """

    @staticmethod
    def forward(
        ctx: object,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        positions: torch.Tensor,
        targets: torch.Tensor,
        bias: torch.Tensor | None = None,
        factor: float = 1.0,
        cap: float = 0.0,
        means: torch.Tensor | None = None,
        rounded: Rounded | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute the loss chunk by chunk, and the gradient of `hidden` with it."""
        picked = hidden.index_select(0, positions)
        if factor != 1.0:  # fewer numbers than the logits have
            picked = picked * factor
            bias = None if bias is None else bias * factor
        # each row begins at a multiple of 16 bytes, or Triton would compile the kernel once more
        aligned = torch.empty(
            3, len(picked) + -len(picked) % 4, device=hidden.device, dtype=torch.float32
        )
        nats, entropies, hits = aligned[:, : len(picked)].unbind()
        gradient = torch.empty_like(picked) if ctx.needs_input_grad[0] else None
        for first in range(0, len(picked), CHUNK):
            chunk = slice(first, first + CHUNK)
            logits = nn.functional.linear(picked[chunk], weight, bias)
            if means is not None:
                means[chunk] = _row_means(logits, cap)
            found = targets[chunk], nats[chunk], entropies[chunk], hits[chunk], cap
            if gradient is None or rounded is None:
                cross_entropy_(logits, *found)
                if gradient is not None:
                    torch.mm(logits, weight, out=gradient[chunk])
            else:
                slopes = _room_in_float8(logits)
                cross_entropy_(logits, *found, slopes)
                gradient[chunk] = float8_product(*slopes, *rounded, rough_sums=False)
                del slopes
            del logits
        ctx.save_for_backward(gradient, positions)
        ctx.shape, ctx.factor = hidden.shape, factor
        ctx.mark_non_differentiable(entropies, hits)
        return nats, entropies, hits

    @staticmethod
    def backward(ctx: object, of_nats: torch.Tensor, *_: torch.Tensor) -> tuple:
        """Returns the gradient that the forward left, times that of each position's nats."""
        gradient, positions = ctx.saved_tensors
        scattered = gradient.new_zeros(ctx.shape)
        scattered.index_copy_(
            0, positions, (gradient.float() * (of_nats * ctx.factor)[:, None]).to(gradient.dtype)
        )
        return scattered, *[None] * 8


def _room_in_float8(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = logits.new_empty(len(logits), 1, dtype=torch.float32)
    return torch.empty_like(logits, dtype=BACKWARD), scale


def _row_means(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """Returns the mean of each row of capped logits [n, words], in float32."""
    pieces = (piece.float() for piece in logits.split(_MEANS_AT_ONCE))
    return torch.cat([cap * torch.tanh(one / cap).mean(dim=-1) for one in pieces])


def cross_entropy_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    nats: torch.Tensor,
    entropies: torch.Tensor,
    hits: torch.Tensor,
    cap: float = 0.0,
    slopes: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Overwrite `logits` [n, words] with d nats / d logits; fill nats, entropies and hits [n].

    A `cap` bounds the logits by cap * tanh(logits / cap) first; 0.0 is none. Computes in float32.
    Where `slopes` are given they are filled with d nats / d logits in float8 [n, words] and their
    scales [n, 1], and `logits` stay.
    """
    if logits.is_cuda:
        from sftlab.fastpath.loss_kernel import softmax_cross_entropy_

        return softmax_cross_entropy_(logits, targets, nats, entropies, hits, cap, slopes)
    bent = torch.tanh(logits.float() / cap) if cap else None
    log_probs = torch.log_softmax(logits.float() if bent is None else cap * bent, dim=-1)
    aimed = log_probs.gather(1, targets[:, None])[:, 0]
    probs = log_probs.exp()
    nats.copy_(-aimed)
    hits.copy_(aimed >= log_probs.amax(dim=-1))
    entropies.copy_(-(probs * log_probs).sum(dim=-1))
    probs.scatter_add_(1, targets[:, None], torch.full_like(aimed, -1.0)[:, None])
    found = probs if bent is None else probs * (1 - bent * bent)
    if slopes is None:
        logits.copy_(found)
    else:
        for room, one in zip(slopes, to_float8(found, slopes[0].dtype, by_row=True), strict=True):
            room.copy_(one)


def in_float8(weight: torch.Tensor) -> Rounded | None:
    """Returns a head's weight [words, size] in float8; None if these are no multiples of 16."""
    if any(size % 16 for size in weight.shape):
        return None
    rounded, scale = to_float8(weight, FORWARD)
    weight_t = transpose(rounded)
    return Rounded(weight_t, scale.repeat(1, len(weight_t)))


def why_not(model: PreTrainedModel) -> str | None:
    """Returns why the fused loss does not work for this model; None if it does."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or any(one.requires_grad for one in head.parameters()):
        return "the head is not a frozen linear layer"
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return f"{model.config.model_type} has a loss of its router besides"
    return None


def needs_whole_logits(training: TrainingArguments) -> str | None:
    """Returns why the loss of supervised fine-tuning cannot be fused, whatever the model."""
    if training.label_smoothing_factor:
        return "label smoothing needs whole logits"
    return None if training.loss_type == "nll" else f"loss_type is {training.loss_type}"


def add_frozen_head_loss(
    model: PreTrainedModel, changes: Changes = NO_CHANGES, rounded: Rounded | None = None
) -> None:
    """Make `model(..., loss_positions=, targets=)` return nats, entropies and hits, [n] each.

    `changes` is what the model does to its logits, and `rounded` the head that gradients come out
    of, unless it is the head itself. Without these arguments the model returns logits as before.
    """
    original = model.forward

    def forward(
        self: PreTrainedModel,
        *args: object,
        loss_positions: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: object,
    ) -> object:
        if loss_positions is None:
            return original(*args, labels=labels, **kwargs)
        hidden = decoder_of(self)(*args, **kwargs | {"use_cache": False}).last_hidden_state
        return _of_frozen_head(self, hidden, loss_positions, targets, changes, rounded=rounded)

    model.forward = types.MethodType(forward, model)


def add_frozen_head_log_probs(model: PreTrainedModel, changes: Changes = NO_CHANGES) -> None:
    """Make `model(..., fused_lm_head=True, answer_positions=)` return what trl's fused head does.

    `input_ids` are [rows, tokens], and `answer_positions` the flat places of tokens whose next one
    is scored. `changes` is what the model does to its logits. Without `answer_positions` the model
    does as before.
    """
    original, head_mean = model.forward, _HeadMean()

    def forward(
        self: PreTrainedModel,
        *args: object,
        input_ids: torch.Tensor | None = None,
        answer_positions: torch.Tensor | None = None,
        **kwargs: object,
    ) -> object:
        if answer_positions is None:
            return original(*args, input_ids=input_ids, **kwargs)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("labels", "fused_lm_head")}
        outputs = decoder_of(self)(*args, input_ids=input_ids, **kwargs | {"use_cache": False})
        hidden, targets = outputs.last_hidden_state, input_ids.flatten()[answer_positions + 1]
        head = self.get_output_embeddings()
        if changes.cap:
            means = hidden.new_empty(len(answer_positions), dtype=torch.float32)
        else:
            means = head_mean.logits(head, hidden, answer_positions) * changes.factor
        of_cap = means if changes.cap else None
        found = _of_frozen_head(self, hidden, answer_positions, targets, changes, of_cap)

        def by_row(values: torch.Tensor) -> torch.Tensor:
            flat = values.new_zeros(input_ids.numel()).index_copy(0, answer_positions, values)
            return flat.view(input_ids.shape)[:, :-1]

        nats, entropy, hits, means = map(by_row, (*found, means))
        return FusedCausalLMOutput(
            log_probs=-nats, entropy=entropy, is_top1=hits.bool(), mean_logits=means
        )

    model.forward = types.MethodType(forward, model)


class _HeadMean:
    """The mean of a frozen head over the vocabulary, kept while its weights stay as they are."""

    def __init__(self) -> None:
        self._of: list[tuple[int, int]] = []
        self._row, self._bias = torch.empty(0), torch.empty(0)

    @torch.no_grad()
    def logits(
        self, head: nn.Linear, hidden: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Returns the mean over the vocabulary of the logits at flat positions, [n] in float32."""
        now = [(one.data_ptr(), one._version) for one in head.parameters()]
        if self._of != now:
            self._of, self._row = now, head.weight.mean(dim=0, dtype=torch.float32)
            self._bias = self._row.new_zeros(()) if head.bias is None else head.bias.float().mean()
        return (hidden.flatten(0, 1) @ self._row.to(hidden.dtype))[positions].float() + self._bias


def _of_frozen_head(
    model: PreTrainedModel,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    targets: torch.Tensor,
    changes: Changes,
    means: torch.Tensor | None = None,
    rounded: Rounded | None = None,
) -> tuple[torch.Tensor, ...]:
    """Returns nats, entropies and hits at flat positions of hidden [rows, tokens, size], [n].

    Fills `means` [n], where given, with the mean of each position's logits.
    """
    head = model.get_output_embeddings()
    weight, bias = (
        one.full_tensor() if isinstance(one, DTensor) else one for one in (head.weight, head.bias)
    )
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return FrozenHeadLoss.apply(
        hidden.flatten(0, 1).to(dtype),
        weight.to(dtype),
        positions,
        targets,
        None if bias is None else bias.to(dtype),
        *changes,
        means,
        rounded,
    )
