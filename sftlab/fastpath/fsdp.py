"""FSDP2 for LoRA: frozen weights are sharded.

Every process keeps the LoRA matrices whole, and trains them as DDP does.

Sharded, these small matrices would cost the host more than all else that FSDP does in a step: a
gather and a reduction a layer, and DTensor's dispatch at every operation of clipping and of the
optimizer.
"""

import re
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import PreTrainedModel

from sftlab.fastpath.compile_layers import decoder_layers

LORA_MODULES = r".*\.lora_[AB]\.\w+"


def settle_plugin(plugin: FullyShardedDataParallelPlugin, model: nn.Module) -> bool:
    """Set accelerate's FSDP2 plugin, before the model is sharded; whether LoRA matrices stay whole.

    They do where nothing else trains. accelerate would reduce gradients and return losses in the
    compute dtype, which DDP does not do.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    whole = all(re.fullmatch(rf"{LORA_MODULES}\.weight", name) for name in trained)
    if whole:
        plugin.ignored_modules = LORA_MODULES
    if plugin.mixed_precision_policy is not None:
        compute, reduced = (
            plugin.mixed_precision_policy.param_dtype,
            None if whole else torch.float32,
        )
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=reduced
        )
    return whole


def gather_ahead(model: PreTrainedModel) -> None:
    """Under FSDP2, let every decoder layer ask for the next one's weights before it computes.

    FSDP2 asks when a layer begins, which is too late where the host is not far ahead of the GPU.
    The last layer keeps its weights for the backward, which begins with it.
    """
    layers = [layer for layer in decoder_layers(model) if isinstance(layer, FSDPModule)]
    for layer, following in pairwise(layers):
        layer.set_modules_to_forward_prefetch([following])
    for layer in layers[-1:]:
        layer.set_reshard_after_forward(False)


def average_replicated_(parameters: Sequence[nn.Parameter]) -> None:
    """Average over all processes the gradients of parameters that each keeps whole, in one
    collective.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(
        gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
    )


def clip_sharded_(parameters: Sequence[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale gradients that are sharded over one mesh (DTensors) to `max_norm`.

    Their norm before, a scalar.

    torch's own takes every small LoRA gradient through DTensor's dispatch, at every operation.
    """
    mesh = parameters[0].grad.device_mesh
    shards = [parameter.grad.to_local() for parameter in parameters if parameter.grad is not None]
    square = torch.stack(torch._foreach_norm(shards)).square().sum()
    dist.all_reduce(square, group=mesh.get_group())
    norm = square.sqrt()
    torch._foreach_mul_(shards, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
