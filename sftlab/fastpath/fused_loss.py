"""Cross-entropy over a frozen head, which holds one chunk of logits at a time.

A frozen head has no gradient of its own. The gradient of the hidden states can be computed while a
chunk's logits exist: two matrix products per token in all. Only positions whose next token is in
the loss are computed.
"""

import types

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

# Positions whose logits exist at one time.
CHUNK = 4096


class FrozenHeadLoss(torch.autograd.Function):
    """Returns nats, entropies and hits of the chosen positions, [n] each.

    Takes hidden [tokens, size], weight [words, size], positions and targets [n]. `hits` is 1.0
    where the target has the highest logit. Only the nats have a gradient, and only with respect to
    `hidden`.
    """

    @staticmethod
    def forward(
        ctx: object,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        positions: torch.Tensor,
        targets: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute the loss chunk by chunk, and the gradient of `hidden` with it."""
        picked = hidden.index_select(0, positions)
        # each row begins at a multiple of 16 bytes, or Triton would compile the kernel once more
        aligned = torch.empty(
            3, len(picked) + -len(picked) % 4, device=hidden.device, dtype=torch.float32
        )
        nats, entropies, hits = aligned[:, : len(picked)].unbind()
        gradient = torch.empty_like(picked) if ctx.needs_input_grad[0] else None
        for first in range(0, len(picked), CHUNK):
            chunk = slice(first, first + CHUNK)
            logits = picked[chunk] @ weight.t()
            cross_entropy_(logits, targets[chunk], nats[chunk], entropies[chunk], hits[chunk])
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[chunk])
            del logits
        ctx.save_for_backward(gradient, positions)
        ctx.shape = hidden.shape
        ctx.mark_non_differentiable(entropies, hits)
        return nats, entropies, hits

    @staticmethod
    def backward(ctx: object, of_nats: torch.Tensor, *_: torch.Tensor) -> tuple:
        """Returns the gradient that the forward left, times that of each position's nats."""
        gradient, positions = ctx.saved_tensors
        scattered = gradient.new_zeros(ctx.shape)
        scattered.index_copy_(
            0, positions, (gradient.float() * of_nats[:, None]).to(gradient.dtype)
        )
        return scattered, None, None, None


def cross_entropy_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    nats: torch.Tensor,
    entropies: torch.Tensor,
    hits: torch.Tensor,
) -> None:
    """Overwrite `logits` [n, words] with d nats / d logits; fill nats, entropies and hits [n].

    Computes in float32.
    """
    if logits.is_cuda:
        from sftlab.fastpath.triton_kernels import softmax_cross_entropy_

        return softmax_cross_entropy_(logits, targets, nats, entropies, hits)
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    aimed = log_probs.gather(1, targets[:, None])[:, 0]
    probs = log_probs.exp()
    nats.copy_(-aimed)
    hits.copy_(aimed >= log_probs.amax(dim=-1))
    entropies.copy_(-(probs * log_probs).sum(dim=-1))
    probs.scatter_add_(1, targets[:, None], torch.full_like(aimed, -1.0)[:, None])
    logits.copy_(probs)


def why_not(model: PreTrainedModel) -> str | None:
    """Returns why the fused loss does not work for this model; None if it does."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if type(head) is not nn.Linear or head.bias is not None or head.weight.requires_grad:
        return "the head is not a frozen linear layer without bias"
    scales = (
        "final_logit_softcapping",
        "logit_scale",
        "output_multiplier",
        "lm_head_multiplier",
        "logits_scaling",
    )
    scaled = [name for name in scales if getattr(config, name, None) not in (None, 1.0)]
    if scaled or getattr(config, "output_router_logits", False):
        return f"{config.model_type} changes its logits ({', '.join(scaled) or 'router'})"
    return None


def add_frozen_head_loss(model: PreTrainedModel) -> None:
    """Make `model(..., loss_positions=, targets=)` return nats, entropies and hits, [n] each.

    Without these arguments the model returns logits as before.
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
        hidden = self.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state.flatten(
            0, 1
        )
        weight = self.get_output_embeddings().weight
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
        device = hidden.device.type
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        )
        return FrozenHeadLoss.apply(hidden.to(dtype), weight.to(dtype), loss_positions, targets)

    model.forward = types.MethodType(forward, model)
