"""Which parts of the fast path a run takes: packing, compiled layers, fused loss. What runs is the same training.

Unset fields choose by themselves; a field that is set is obeyed, or refused where it cannot be.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sftlab.config.launch import COMPUTE_DTYPE, PRECISIONS, Launch
from sftlab.config.parser import Recipe
from sftlab.data.collator import TOKENS_MULTIPLE, tiles
from sftlab.fastpath import varlen_attention
from sftlab.fastpath.fused_loss import CHUNK, FrozenHeadLoss
from sftlab.models.loading import model_class

UNTIMED = "not timed with 8-bit weights under FSDP; the recipe's field of that name switches it on"


@dataclass
class FastPath:
    """The parts that are on; `reasons` says of each part that chose to be off why."""

    packing: bool
    compile_layers: bool
    fused_loss: bool | None
    attn_implementation: str | None
    reasons: dict[str, str] = field(default_factory=dict)


def choose(
    recipe: Recipe, config: PreTrainedConfig, launch: Launch, elsewhere: Callable[[], str | None] | None = None
) -> FastPath:
    """Decide before any weights are loaded. Raises ValueError for packing that was asked for and cannot be had.

    `elsewhere` says why another machine than this one has no Triton kernels.
    """
    model = model_class(config)
    attention, reasons = recipe.model.attn_implementation, {}
    why = "rows of a stream come without their lengths" if recipe.data.dataset_streaming else None
    if attention not in (None, varlen_attention.NAME):
        why = why or f"attention {attention} would need a dense mask over the packed rows"
    if elsewhere is None:
        why = why or varlen_attention.why_not(config, model)
    else:
        why = why or elsewhere() or varlen_attention.why_not_the_model(config, model)
    if (recipe.training.packing or attention == varlen_attention.NAME) and why:
        raise ValueError(
            f"packing is not possible here: {why}; leave packing and attn_implementation out of the recipe"
        )
    packing = why is None and recipe.training.packing is not False
    if why and recipe.training.packing is None:
        reasons["packing"] = why
    if attention == varlen_attention.NAME and not packing:
        raise ValueError("attn_implementation varlen is for packed rows: leave packing out of the recipe")
    compiled = recipe.training.compile_layers
    if compiled is None:
        compiled = (elsewhere or varlen_attention.no_triton)() is None and not recipe.training.torch_compile
        if compiled and launch.strategy == "fsdp" and recipe.model.load_in_8bit:
            compiled, reasons["compile_layers"] = False, UNTIMED
    return FastPath(
        packing, compiled, recipe.training.fused_loss, varlen_attention.NAME if packing else attention, reasons
    )


def compile_layers(model: PreTrainedModel) -> None:
    """Compile the forward of every decoder layer and of the last norm, in place.

    Layers share one graph. The token dimension is dynamic from the start, so that batches of other sizes compile
    nothing anew. Forward alone is compiled: hooks of FSDP, peft and checkpointing stay outside. Frozen embeddings have
    no gradient, which would make the first layer another graph: where it trains something, it is given one to drop.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no list of decoder layers: pass --compile_layers false")
    norms = [m for name, m in model.base_model.named_children() if "norm" in name]
    for module in [*layers, *norms]:
        module.forward = _with_dynamic_tokens(torch.compile(module.forward))
        if in_4bit := [m for m in module.modules() if "quant_state" in vars(m)]:
            module.forward = _with_quant_states(module.forward, in_4bit)
    if any(parameter.requires_grad for parameter in layers[0].parameters()):
        layers[0].forward = _with_gradient(layers[0].forward)


def start_compilers(recipe: Recipe, config: PreTrainedConfig, fast: FastPath) -> Future:
    """Begin beside the reading of data and weights what would hold up the first step by seconds.

    Inductor's worker processes; and on a GPU, in a thread that ends with the future, Triton's kernels for this model
    and the libraries behind the head's matrix products.
    """
    if fast.compile_layers:
        from torch._inductor.async_compile import maybe_warm_pool

        maybe_warm_pool()
    # to fork while a thread compiles could leave the child with a lock that nobody frees
    if not fast.packing or recipe.training.dataset_num_proc:
        nothing = Future()
        nothing.set_result(None)
        return nothing
    dtype = getattr(torch, COMPUTE_DTYPE[PRECISIONS[recipe.training.mixed_precision]])
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    # a thread begins on the first GPU, whichever its process has taken
    thread = ThreadPoolExecutor(1, "rehearsal", torch.cuda.set_device, (device,))
    future = thread.submit(rehearse, config.get_text_config(), dtype, device, fast.fused_loss is not False)
    thread.shutdown(wait=False)
    return future


def rehearse(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, fused_loss: bool) -> None:
    """Run the kernels of a packed step once, on tensors for which Triton compiles what the step will call.

    Of the fused loss's chunk only so much that, with a head of its own, it takes about the memory of the step's chunk.
    """
    heads, tokens = config.num_attention_heads, TOKENS_MULTIPLE
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    make = partial(torch.zeros, dtype=dtype, device=device, requires_grad=True)
    query, key, value = (make(tokens, n, size) for n in (heads, key_heads, key_heads))
    varlen_attention.varlen_attention(query, key, value, tiles([tokens]).to(device), size**-0.5)[0].sum().backward()
    if fused_loss:
        rows = max(CHUNK // 4, CHUNK - config.hidden_size)
        hidden, head = make(rows, config.hidden_size), make(config.vocab_size, config.hidden_size).detach()
        every = torch.arange(rows, device=device)
        FrozenHeadLoss.apply(hidden, head, every, every % config.vocab_size)[0].sum().backward()


def decoder_layers(model: PreTrainedModel) -> Sequence[nn.Module]:
    """The list of its decoder layers, in order; empty where there is none."""
    count = model.config.num_hidden_layers
    lists = (m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    return next(lists, [])


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


def _with_quant_states(forward: Callable, linears: Sequence[nn.Module]) -> Callable:
    """FSDP gathers 4-bit weights without their scales, which bitsandbytes would add where the graph breaks over it."""
    from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

    def with_quant_states(*args: object, **kwargs: object) -> object:
        for linear in linears:
            fix_4bit_weight_quant_state_from_module(linear)
        return forward(*args, **kwargs)

    return with_quant_states


def _with_gradient(forward: Callable) -> Callable:
    def with_gradient(hidden_states: torch.Tensor, *args: object, **kwargs: object) -> object:
        if torch.is_grad_enabled() and not hidden_states.requires_grad:
            hidden_states = _Dropped.apply(hidden_states, hidden_states.new_empty(0).requires_grad_())
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
