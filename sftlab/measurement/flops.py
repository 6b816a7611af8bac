"""Model FLOPs of a training step, per token."""

from typing import NamedTuple

from torch import nn
from transformers import PreTrainedConfig

from sftlab.models.mixture import counts_of

# experts stack their biases, and a recurrence its decays
NOT_MULTIPLIED = ("bias", "A_log")


class Flops(NamedTuple):
    """FLOPs of every token, and those of the head, which only tokens in the loss add."""

    token: float
    loss_token: float


def flops_per_token(model: nn.Module) -> Flops:
    """Returns the model FLOPs per token of a forward and a backward.

    A frozen matrix parameter takes 4 FLOPs: 2 in the forward, 2 for the gradient of its input. A
    trainable one takes 2 more, for its own gradient. The usual 6 per parameter would count
    gradients that LoRA never computes.

    Embeddings are lookups and take none. Of a mixture of experts, the share that a token visits
    counts. Of a module saved whole, only the trained copy counts. Attention scores, recurrences and
    the recomputation of gradient checkpointing are left out.
    """
    head = model.get_output_embeddings()
    head = next(iter(getattr(head, "modules_to_save", {}).values()), head).weight
    left_out = {id(head), *(id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding))}
    left_out |= {id(p) for name, p in model.named_parameters() if ".original_module." in name}
    taken = _experts_taken(model.config.get_text_config())
    matrices = {
        name: p
        for name, p in model.named_parameters()
        if p.ndim > 1 and id(p) not in left_out and not name.endswith(NOT_MULTIPLIED)
    }
    return Flops(
        sum(_flops(p) * (taken if ".experts." in name else 1) for name, p in matrices.items()),
        _flops(head),
    )


def _flops(parameter: nn.Parameter) -> float:
    return (6.0 if parameter.requires_grad else 4.0) * parameter.numel() * _packed_factor(parameter)


def _experts_taken(config: PreTrainedConfig) -> float:
    """Returns the share of a mixture's experts that a token visits.

    Returns 1.0 for dense models and for configs that do not say it in one number.
    """
    counts = counts_of(config)
    return counts[1] / counts[0] if counts else 1.0


def _packed_factor(parameter: nn.Parameter) -> float:
    """Returns how many weights one stored element of a bitsandbytes parameter holds."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() / parameter.numel() if state is not None else 1.0
