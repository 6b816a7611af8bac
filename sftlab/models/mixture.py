"""How many experts has a mixture's layer, how many does a token visit, and how wide is one?"""

from typing import NamedTuple

from torch import nn
from transformers import PreTrainedConfig

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TAKEN = (
    *("num_experts_per_tok", "num_experts_per_token", "top_k_experts"),
    *("moe_topk", "moe_k"),
)
# linears of an MLP, which a layer of experts alone does not have
_DENSE = frozenset(("gate_proj", "up_proj", "down_proj", "gate_up_proj"))


class Mixture(NamedTuple):
    """A decoder whose layers have `experts` of an inner `width`; a token visits `taken` of them.

    `other` says what the layers have besides, None where all are alike and of experts alone.
    """

    experts: int
    taken: int
    width: int
    other: str | None = None


def counts_of(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Returns a layer's experts and those that a token visits; None where they are not numbers."""
    fields = config.to_dict()
    found = [
        next((fields[name] for name in names if isinstance(fields.get(name), int)), None)
        for names in (COUNTS, TAKEN)
    ]
    return (found[0], found[1]) if all(found) else None


def mixture_of(model: nn.Module, config: PreTrainedConfig) -> Mixture | None:
    """Returns a model's experts; None for one whose experts are not stacked, or not counted."""
    layers = next((m for m in model.modules() if isinstance(m, nn.ModuleList)), [])
    stacked = [
        parameter
        for name, parameter in layers.named_parameters()
        if parameter.ndim == 3 and name.endswith("experts.down_proj")
    ] if len(layers) else []  # fmt: skip
    counts = counts_of(config)
    if not stacked or counts is None:
        return None
    width = stacked[0].numel() // (len(stacked[0]) * config.hidden_size)
    shapes = {tuple((n, p.shape) for n, p in layer.named_parameters()) for layer in layers}
    linears = (n for n, m in layers.named_modules() if isinstance(m, nn.Linear))
    other = None
    if len(shapes) > 1:
        other = "layers of several kinds"
    elif _DENSE & {name.rpartition(".")[2] for name in linears}:
        other = "experts that every token visits"
    return Mixture(*counts, width, other)
