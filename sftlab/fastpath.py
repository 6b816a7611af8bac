"""Which parts of the fast path a run takes: packing, compiled layers, fused loss. What runs is the same training.

Unset fields choose by themselves; a field that is set is obeyed, or refused where it cannot be.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from sftlab import varlen
from sftlab.config import Recipe
from sftlab.launch import Launch

PARTS = ("packing", "compile_layers", "fused_loss")
UNTRIED = "not yet measured under FSDP; the recipe's field of that name switches it on"


@dataclass
class FastPath:
    """The parts that are on; `reasons` says of each part that chose to be off why."""

    packing: bool
    compile_layers: bool
    fused_loss: bool | None
    attn_implementation: str | None
    reasons: dict[str, str] = field(default_factory=dict)


def choose(recipe: Recipe, config: PreTrainedConfig, launch: Launch) -> FastPath:
    """Decide before any weights are loaded. Raises ValueError for packing that was asked for and cannot be had."""
    training, asked = recipe.training, recipe.model.attn_implementation
    if launch.strategy == "fsdp":
        fast = FastPath(bool(training.packing), bool(training.compile_layers), bool(training.fused_loss), asked)
        fast.reasons = {name: UNTRIED for name in PARTS if getattr(training, name) is None}
        fast.attn_implementation = varlen.NAME if fast.packing else asked
        return fast
    why = "rows of a stream come without their lengths" if recipe.data.dataset_streaming else None
    if asked not in (None, varlen.NAME):
        why = why or f"attention {asked} would need a dense mask over the packed rows"
    why = why or varlen.why_not(config, model_class(config))
    if (training.packing or asked == varlen.NAME) and why:
        raise ValueError(
            f"packing is not possible here: {why}; leave packing and attn_implementation out of the recipe"
        )
    packing = why is None and training.packing is not False
    reasons = {"packing": why} if why and training.packing is None else {}
    if asked == varlen.NAME and not packing:
        raise ValueError("attn_implementation varlen is for packed rows: leave packing out of the recipe")
    compile_layers = training.compile_layers
    if compile_layers is None:
        compile_layers = varlen.no_triton() is None and not training.torch_compile
    return FastPath(packing, compile_layers, training.fused_loss, varlen.NAME if packing else asked, reasons)


def model_class(config: PreTrainedConfig) -> type | None:
    """The class that transformers' own code gives this config; None for a model of remote code."""
    mapping = AutoModelForCausalLM._model_mapping
    return mapping.get(type(config), None)


def compile_layers(model: PreTrainedModel) -> int:
    """Compile the forward of every decoder layer and of the last norm, in place; the number of layers.

    Layers share one graph. The token dimension is dynamic from the start, so that batches of other sizes compile
    nothing anew. Forward alone is compiled: hooks of FSDP, peft and checkpointing stay outside.
    """
    decoder = model.base_model
    layers = next(
        (m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == model.config.num_hidden_layers),
        None,
    )
    if layers is None:
        raise ValueError(f"{type(model).__name__} has no list of decoder layers: pass --compile_layers false")
    norms = [m for name, m in decoder.named_children() if "norm" in name]
    for module in [*layers, *norms]:
        module.forward = _with_dynamic_tokens(torch.compile(module.forward))
    return len(layers)


def _with_dynamic_tokens(compiled: Callable) -> Callable:
    def forward(hidden_states: torch.Tensor, *args: object, **kwargs: object) -> object:
        rotary, tiles = kwargs.get("position_embeddings"), kwargs.get("tiles")
        by_token = [hidden_states, kwargs.get("position_ids"), *(rotary if isinstance(rotary, tuple) else ()), tiles]
        for tensor in by_token:
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
        if kwargs.get("attention_mask") is not None:
            torch._dynamo.maybe_mark_dynamic(kwargs["attention_mask"], [2, 3])
        return compiled(hidden_states, *args, **kwargs)

    return forward
