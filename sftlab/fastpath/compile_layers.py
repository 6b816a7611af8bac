"""Compiles the decoder layers once, for any number of tokens."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from sftlab.fastpath.experts_lora import keep_peft_uncompiled
from sftlab.fastpath.four_bit_layers import four_bit_linears
from sftlab.fastpath.recomputed_norms import recompute_norms
from sftlab.models.layers import decoder_of


def compile_layers(model: PreTrainedModel, checkpointed: bool = False) -> None:
    """Compile the forward of every decoder layer and of the last norm, in place.

    Layers share one graph. The token dimension is dynamic from the start, so batches of other sizes
    do not recompile. Only the forward is compiled: hooks of FSDP, peft and gradient checkpointing
    stay outside. The output of frozen embeddings needs no gradient, which would give the first
    layer a graph of its own; if that layer trains something, its input gets a gradient to drop.
    Norms of layers are computed again in the backward, unless `checkpointed` layers are as a whole.
    Raises ValueError for a model without a list of decoder layers.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no list of decoder layers: pass --compile_layers false"
        )
    keep_peft_uncompiled(model)
    _keep_graphs_of_functions()
    _compile_what_would_run()
    norms = [m for name, m in decoder_of(model).named_children() if "norm" in name]
    if not checkpointed:
        for layer in layers:
            recompute_norms(layer)
    for module in [*layers, *norms]:
        module.forward = _with_dynamic_tokens(torch.compile(module.forward))
        if in_4bit := four_bit_linears(module):
            module.forward = _with_quant_states(module.forward, in_4bit)
    if any(parameter.requires_grad for parameter in layers[0].parameters()):
        layers[0].forward = _with_gradient(layers[0].forward)


def _keep_graphs_of_functions() -> None:
    """Let torch keep compiled graphs that have an autograd.Function in them, as it keeps others.

    torch 2.11 to 2.13 leaves them out unless told otherwise, so every start would trace them anew.
    What they are kept under has the traced forward and backward of each Function in it.
    """
    from torch._functorch import config

    if hasattr(config, "autograd_cache_allow_custom_autograd_functions"):
        config.autograd_cache_allow_custom_autograd_functions = True


def _compile_what_would_run() -> None:
    """Let torch.compile trace a model as it runs, not as torch.export would see it.

    To compiled code torch 2.11 says that it is exported. transformers then leaves out the kernels
    of a package, and unrolls loops over tokens. torch 2.13 no longer does.
    """
    from torch._dynamo.variables import torch as traced

    answers = getattr(traced, "tracing_state_functions", dict)()
    if torch.compiler.is_exporting in answers:
        answers[torch.compiler.is_exporting] = False


def decoder_layers(model: PreTrainedModel) -> Sequence[nn.Module]:
    """Returns the model's decoder layers, in order; an empty list if it has no such list."""
    count = model.config.get_text_config().num_hidden_layers
    lists = (
        m for m in decoder_of(model).modules() if isinstance(m, nn.ModuleList) and len(m) == count
    )
    return next(lists, [])


def _with_dynamic_tokens(compiled: Callable) -> Callable:
    def forward(hidden_states: torch.Tensor, *args: object, **kwargs: object) -> object:
        rotary, tiles = kwargs.get("position_embeddings"), kwargs.get("tiles")
        for tensor in (hidden_states, kwargs.get("position_ids"), tiles):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
        if kwargs.get("seq_idx") is not None:
            torch._dynamo.maybe_mark_dynamic(kwargs["seq_idx"], 1)
            torch._dynamo.maybe_mark_dynamic(kwargs["cu_seq_lens_q"], 0)
            torch._dynamo.maybe_mark_dynamic(kwargs["row_places"], [0, 1])
        for tensor in rotary if isinstance(rotary, tuple) else ():
            torch._dynamo.maybe_mark_dynamic(tensor, tensor.ndim - 2)  # some have an axis of images
        if kwargs.get("attention_mask") is not None:
            torch._dynamo.maybe_mark_dynamic(kwargs["attention_mask"], [2, 3])
        return compiled(hidden_states, *args, **kwargs)

    return forward


def _with_quant_states(forward: Callable, linears: Sequence[nn.Module]) -> Callable:
    """Returns `forward` with the scales of 4-bit weights set beforehand.

    FSDP gathers the weights without them. bitsandbytes would set them inside, and break the graph.
    """
    from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

    def with_quant_states(*args: object, **kwargs: object) -> object:
        for linear in linears:
            # what fix_... looks at first, without the ways through nn.Module
            if getattr(linear._parameters["weight"], "quant_state", None) is None:
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
    """Returns its first input as a tensor that needs a gradient; the gradient is dropped."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple[None, None]:
        return None, None
