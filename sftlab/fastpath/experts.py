"""How are the experts of a mixture multiplied: in one grouped product, or one after the other?

The grouped product takes tokens sorted by expert, and waits for no figure from the GPU. It knows no
autocast: it computes in the dtype of the weights, whatever the launch config says. So it is taken
where both are bfloat16.
"""

import torch
from transformers import PreTrainedModel

from sftlab.config.launch import BF16_CAPABILITY

GROUPED, ONE_BY_ONE = "grouped_mm", "eager"
# the kernels read 16 bytes at once: 8 elements of 2 bytes
ALIGNED = 8


def stacked_experts(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Returns the weights of experts, of three dimensions; none for a dense model."""
    named = model.named_parameters()
    return [one for name, one in named if one.ndim == 3 and ".experts." in name]


def take_experts_product(model: PreTrainedModel, precision: str) -> tuple[str | None, str | None]:
    """Let a mixture multiply its experts as the hardware and the precision allow.

    Returns what is taken, None for a model whose experts are no choice, and why it is not the
    grouped product, None where it is.
    """
    weights = stacked_experts(model)
    if not weights or not model._can_set_experts_implementation():
        return None, None
    why = _why_not_grouped(weights, precision)
    taken = ONE_BY_ONE if why else GROUPED
    model.set_experts_implementation(taken)
    return taken, why


def _why_not_grouped(weights: list[torch.nn.Parameter], precision: str) -> str | None:
    if not torch.cuda.is_available():
        return "a CPU has no kernel for it"
    if torch.cuda.get_device_capability() < BF16_CAPABILITY:
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
    if precision != "bf16" or any(one.dtype != torch.bfloat16 for one in weights):
        return "it knows no autocast, and launch config and weights are not both bfloat16"
    if any(size % ALIGNED for one in weights for size in one.shape[1:]):
        return f"widths of the experts are no multiples of {ALIGNED}"
    return None
