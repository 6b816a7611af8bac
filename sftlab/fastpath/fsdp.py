"""FSDP2 for LoRA: the frozen weights are sharded, the LoRA matrices are not.

Every process keeps the LoRA matrices whole and trains them as DDP does. Sharding such small
matrices would cost the host more than the rest of FSDP: a gather and a reduction per layer, and
DTensor's dispatch at every operation of the clipping and of the optimizer.
"""

import functools
import re
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sftlab.fastpath.compile_layers import decoder_layers
from sftlab.fastpath.fsdp_units import units_of

LORA_MODULES = r".*\.lora_[AB]\.\w+"


def resolve_plugin(plugin: FullyShardedDataParallelPlugin, model: nn.Module) -> bool:
    """Set up accelerate's FSDP2 plugin; call it before the model is sharded.

    Returns whether the LoRA matrices stay whole: they do if nothing else trains. accelerate's own
    setting would reduce gradients and return losses in the compute dtype, unlike DDP.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    whole = all(re.fullmatch(rf"{LORA_MODULES}\.weight", name) for name in trained)
    if whole:
        plugin.ignored_modules = LORA_MODULES
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=plugin.mixed_precision_policy.param_dtype,
            reduce_dtype=None if whole else torch.float32,
        )
    _let_ungathered_weights_be()
    return whole


def _let_ungathered_weights_be() -> None:
    """Let a micro-batch that ends no step leave out weights that nothing has gathered.

    The fused loss reads the head without FSDP's hooks, and torch looks for a gradient of the
    gathered head there, which is not there.
    """
    convert = FSDPParam.to_accumulated_grad_if_needed
    if convert.__module__ != FSDPParam.__module__:
        return

    @functools.wraps(convert, assigned=("__name__", "__doc__"))
    def convert_if_gathered(self: FSDPParam) -> None:
        if hasattr(self, "_unsharded_param"):
            convert(self)

    FSDPParam.to_accumulated_grad_if_needed = convert_if_gathered


def gather_ahead(model: PreTrainedModel, layers_per_unit: int = 1) -> None:
    """Make every unit of decoder layers gather the next one's weights before it computes.

    FSDP2 gathers weights when their unit begins. That is too late if the host is not far ahead of
    the GPU. The last unit keeps its weights, because the backward begins with it. Embeddings of
    their own are not gathered for a backward that does not read them.
    """
    layers = [layer for layer in decoder_layers(model) if isinstance(layer, FSDPModule)]
    units = units_of(layers, layers_per_unit)
    for unit, following in pairwise(units):
        unit[0].set_modules_to_forward_prefetch([following[0]])
    for unit in units[-1:]:
        unit[0].set_reshard_after_forward(False)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    frozen = not any(parameter.requires_grad for parameter in embeddings.parameters())
    if isinstance(embeddings, FSDPModule) and frozen and not tied:
        embeddings.set_unshard_in_backward(False)


def average_replicated_(parameters: Sequence[nn.Parameter]) -> None:
    """Average the gradients of whole parameters over all processes, in one collective."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(
        gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
    )


def is_sharded_over_one_mesh(parameters: Sequence[nn.Parameter]) -> bool:
    """Returns whether all parameters are DTensors on a mesh of one dimension."""
    return all(isinstance(p, DTensor) and p.device_mesh.ndim == 1 for p in parameters)


def clip_sharded_(parameters: Sequence[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clip the gradients of parameters that are sharded over one mesh to `max_norm`.

    Returns their norm before the clipping, a scalar. torch's own function sends every small LoRA
    gradient through DTensor's dispatch, at every operation.
    """
    mesh = parameters[0].grad.device_mesh
    shards = [parameter.grad.to_local() for parameter in parameters if parameter.grad is not None]
    square = torch.stack(torch._foreach_norm(shards)).square().sum()
    dist.all_reduce(square, group=mesh.get_group())
    norm = square.sqrt()
    torch._foreach_mul_(shards, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
