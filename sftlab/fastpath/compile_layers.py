"""Each decoder layer compiled once, for every number of tokens."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel


def compile_layers(model: PreTrainedModel) -> None:
    """Compile the forward of every decoder layer and of the last norm, in place.

    Layers share one graph. The token dimension is dynamic from the start, so that batches of other
    sizes compile nothing anew. Forward alone is compiled: hooks of FSDP, peft and checkpointing
    stay outside. Frozen embeddings have no gradient, which would make the first layer another
    graph: where it trains something, it is given one to drop.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no list of decoder layers: pass --compile_layers false"
        )
    norms = [m for name, m in model.base_model.named_children() if "norm" in name]
    for module in [*layers, *norms]:
        module.forward = _with_dynamic_tokens(torch.compile(module.forward))
        if in_4bit := [m for m in module.modules() if "quant_state" in vars(m)]:
            module.forward = _with_quant_states(module.forward, in_4bit)
    if any(parameter.requires_grad for parameter in layers[0].parameters()):
        layers[0].forward = _with_gradient(layers[0].forward)


def decoder_layers(model: PreTrainedModel) -> Sequence[nn.Module]:
    """The list of its decoder layers, in order; empty where there is none."""
    count = model.config.num_hidden_layers
    lists = (
        m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count
    )
    return next(lists, [])


def _with_dynamic_tokens(compiled: Callable) -> Callable:
    def forward(hidden_states: torch.Tensor, *args: object, **kwargs: object) -> object:
        rotary, tiles = kwargs.get("position_embeddings"), kwargs.get("tiles")
        by_token = [
            hidden_states,
            kwargs.get("position_ids"),
            *(rotary if isinstance(rotary, tuple) else ()),
            tiles,
        ]
        for tensor in by_token:
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
        if kwargs.get("attention_mask") is not None:
            torch._dynamo.maybe_mark_dynamic(kwargs["attention_mask"], [2, 3])
        return compiled(hidden_states, *args, **kwargs)

    return forward


def _with_quant_states(forward: Callable, linears: Sequence[nn.Module]) -> Callable:
    """FSDP gathers 4-bit weights without their scales, which bitsandbytes would add where the graph
    breaks over it.
    """
    from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

    def with_quant_states(*args: object, **kwargs: object) -> object:
        for linear in linears:
            fix_4bit_weight_quant_state_from_module(linear)
        return forward(*args, **kwargs)

    return with_quant_states


def _with_gradient(forward: Callable) -> Callable:
    def with_gradient(hidden_states: torch.Tensor, *args: object, **kwargs: object) -> object:
        if torch.is_grad_enabled() and not hidden_states.requires_grad:
            hidden_states = _Dropped.apply(
                hidden_states, hidden_states.new_empty(0).requires_grad_()
            )
        return forward(hidden_states, *args, **kwargs)

    return with_gradient


class _Dropped(torch.autograd.Function):
    """The first input as one that has a gradient, which goes nowhere."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple[None, None]:
        return None, None
