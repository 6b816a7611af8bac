"""FLOPs of a model's forward and backward, a token."""

from typing import NamedTuple

from torch import nn
from transformers import PreTrainedConfig


class Flops(NamedTuple):
    """Model FLOPs of a token, and what a token in the loss takes beyond them: the head's."""

    token: float
    loss_token: float


def flops_per_token(model: nn.Module) -> Flops:
    """Model FLOPs a token, forward and backward.

    4 for each frozen matrix parameter (2 forward, 2 for the gradient of its input) and 6 for each
    trainable one (2 more for its own gradient). The embedding is a lookup; the head, tied or not,
    counts where a token is in the loss. Attention scores and recomputation under checkpointing are
    left out. 6N for every parameter would count gradients that LoRA never computes; of experts
    those that a token goes to are counted, of a module saved whole its copy.
    """
    head = model.get_output_embeddings()
    head = next(iter(getattr(head, "modules_to_save", {}).values()), head).weight
    left_out = {id(head), *(id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding))}
    left_out |= {id(p) for name, p in model.named_parameters() if ".original_module." in name}
    taken = _experts_taken(model.config.get_text_config())
    matrices = {
        name: p for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in left_out
    }
    return Flops(
        sum(_flops(p) * (taken if ".experts." in name else 1) for name, p in matrices.items()),
        _flops(head),
    )


def _flops(parameter: nn.Parameter) -> float:
    return (6.0 if parameter.requires_grad else 4.0) * parameter.numel() * _packed_factor(parameter)


def _experts_taken(config: PreTrainedConfig) -> float:
    """The share of a mixture's experts that work on a token.

    1 where the config does not say it in one number.
    """
    fields = config.to_dict()
    experts, taken = (
        next((fields[name] for name in names if isinstance(fields.get(name), int)), None)
        for names in (
            ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
            ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k"),
        )
    )
    return taken / experts if experts and taken else 1.0


def _packed_factor(parameter: nn.Parameter) -> float:
    """Weights that one stored element of a bitsandbytes parameter stands for."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() / parameter.numel() if state is not None else 1.0
