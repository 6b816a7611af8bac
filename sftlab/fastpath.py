"""Which parts of the fast path a run takes: packing, compiled layers, fused loss. What runs is the same training.

Unset fields choose by themselves; a field that is set is obeyed, or refused where it cannot be.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from sftlab import varlen
from sftlab.config import Recipe
from sftlab.launch import Launch

# Weights whose sharded layers have not been compiled on GPUs yet.
UNTRIED = "not tried with {} weights under FSDP; the recipe's field of that name switches it on"


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
    if attention not in (None, varlen.NAME):
        why = why or f"attention {attention} would need a dense mask over the packed rows"
    if elsewhere is None:
        why = why or varlen.why_not(config, model)
    else:
        why = why or elsewhere() or varlen.why_not_the_model(config, model)
    if (recipe.training.packing or attention == varlen.NAME) and why:
        raise ValueError(
            f"packing is not possible here: {why}; leave packing and attn_implementation out of the recipe"
        )
    packing = why is None and recipe.training.packing is not False
    if why and recipe.training.packing is None:
        reasons["packing"] = why
    if attention == varlen.NAME and not packing:
        raise ValueError("attn_implementation varlen is for packed rows: leave packing out of the recipe")
    compiled = recipe.training.compile_layers
    if compiled is None:
        compiled = (elsewhere or varlen.no_triton)() is None and not recipe.training.torch_compile
        if compiled and launch.strategy == "fsdp" and (weights := _rounded_weights(recipe)):
            compiled, reasons["compile_layers"] = False, UNTRIED.format(weights)
    return FastPath(packing, compiled, recipe.training.fused_loss, varlen.NAME if packing else attention, reasons)


def _rounded_weights(recipe: Recipe) -> str | None:
    model = recipe.model
    bits = "4-bit" if model.load_in_4bit else "8-bit" if model.load_in_8bit else None
    return bits or ("float8" if recipe.training.mixed_precision == "fp8" else None)


def model_class(config: PreTrainedConfig) -> type | None:
    """The class that transformers' own code gives this config; None for a model of remote code."""
    mapping = AutoModelForCausalLM._model_mapping
    return mapping.get(type(config), None)


def compile_layers(model: PreTrainedModel) -> None:
    """Compile the forward of every decoder layer and of the last norm, in place.

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


def clip_sharded_(parameters: Sequence[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale gradients that are sharded over one mesh (DTensors) to `max_norm`; their norm before, a scalar.

    torch's own takes every small LoRA gradient through DTensor's dispatch, at every operation.
    """
    mesh = parameters[0].grad.device_mesh
    shards = [parameter.grad.to_local() for parameter in parameters if parameter.grad is not None]
    square = torch.stack(torch._foreach_norm(shards)).square().sum()
    dist.all_reduce(square, group=mesh.get_group())
    norm = square.sqrt()
    torch._foreach_mul_(shards, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


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
