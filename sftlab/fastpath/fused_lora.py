"""Which LoRA layers compute in one product with their frozen linear."""

from collections.abc import Iterator

import torch
from peft.tuners import lora
from torch import nn
from transformers import PreTrainedModel

from sftlab.fastpath import float8_lora
from sftlab.fastpath.float8 import FrozenFloat8Linear
from sftlab.fastpath.float8_lora import share_a_scale
from sftlab.fastpath.four_bit_layers import four_bit_linears
from sftlab.fastpath.fused_lora_check import differs
from sftlab.fastpath.lora_mlp import LoraMlp, fuse_mlp, unfuse_mlp
from sftlab.fastpath.lora_products import (
    LARGEST_SHARED_RANK,
    LoraProduct,
    SharedInput,
    copy_matrices,
    padded,
)
from sftlab.fastpath.mlp_ops import let_kernels_have_lora
from sftlab.fastpath.one_adapter import why_not_plain
from sftlab.fastpath.own_class import own_class, with_forward
from sftlab.fastpath.selection import FastPath
from sftlab.fastpath.unset_fused_lora import SHARDED
from sftlab.models.inner_model import inner_model
from sftlab.models.layers import decoder_of

# names under which linears of one module read the same tensor
ATTENTION = ("q_proj", "k_proj", "v_proj")
SIBLINGS = (ATTENTION, ("gate_proj", "up_proj"))


def take_fused_lora(model: nn.Module, fast: FastPath, strategy: str, dtype: torch.dtype) -> None:
    """Fuse the model's LoRA layers where that was chosen; note why some stay peft's.

    `dtype` is that of the products. 4-bit linears have the product that they keep already. Layers
    are compared with peft's before they are compiled. Where fused LoRA is needed, raises ValueError
    if no layer can, or if one computes something else.
    Where it is not, the model then is as peft made it, as it is where no MLP is one function.
    """
    let_kernels_have_lora(fast.kernels_with_lora)
    if not fast.fused_lora:
        return
    layers = sum(isinstance(module, lora.LoraLayer) for module in model.modules())
    left = {SHARDED: layers} if strategy == "fsdp" else fuse_lora(model, dtype)
    reason = "; ".join(f"{count} of {layers} LoRA layers: {why}" for why, count in left.items())
    if sum(left.values()) == layers:
        impossible = reason or "there is no LoRA layer"
    else:
        whole = any(isinstance(module, LoraMlp) for module in model.modules())
        alone = None if whole or fast.needs_fused_lora else "no MLP is one function with it"
        impossible = alone or differs(model)
    if impossible and fast.needs_fused_lora:
        raise ValueError(
            f"fused_lora is not possible here: {impossible}; {fast.without_fused_lora}"
        )
    if impossible:
        unfuse_lora(model)
        fast.fused_lora, fast.reasons["fused_lora"] = False, impossible
    elif reason:
        fast.reasons["fused_lora"] = f"for {reason}"


def fuse_lora(model: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """Let every LoRA layer of the model that is understood compute in one product, in place.

    `dtype` is that of the products. Parameters, their names and what peft saves stay as they are.
    Returns how many layers stay on peft's path, by reason.
    """
    decoder = _decoder(model)
    within = set(decoder.modules())  # what it begins with copies what LoRA trains
    left: dict[str, int] = {}
    for layer in [m for m in model.modules() if isinstance(m, lora.LoraLayer)]:
        reason = why_not(layer, dtype) if layer in within else "they are outside the decoder"
        if reason:
            left[reason] = left.get(reason, 0) + 1
        else:
            layer.__class__ = with_forward(LoraProduct, type(layer))
    groups = [_group(layers, far) for layers, far in _sharing(model)]
    for group in groups:
        for place, layer in enumerate(group.layers):
            layer.together, layer.place = group, place
    for module in decoder.modules():
        fuse_mlp(module)
    _leave_out_of_broadcasts(model, groups)
    if groups:
        copies = _Copies(groups)
        copies.hook = decoder.register_forward_pre_hook(copies)
    return left


def _leave_out_of_broadcasts(model: nn.Module, groups: list[SharedInput]) -> None:
    """Let DDP send no frozen weights that will keep no memory: it could not write to them.

    Every process has read the same.
    """
    frozen = {one.base_layer.weight for group in groups if group.in_float8 for one in group.layers}
    left = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    left |= {name for name, parameter in model.named_parameters() if parameter in frozen}
    if left:
        model._ddp_params_and_buffers_to_ignore = sorted(left)


def unfuse_lora(model: nn.Module) -> None:
    """Let every LoRA layer compute as peft does again, in place.

    The frozen weights stay where they are, with room for LoRA's matrices beside them where the
    decoder has run. Layers must not be compiled yet.
    """
    for hook in list(_decoder(model)._forward_pre_hooks.values()):
        if isinstance(hook, _Copies):
            hook.hook.remove()
    for module in list(model.modules()):
        if isinstance(module, LoraMlp):
            unfuse_mlp(module)
        elif isinstance(module, LoraProduct):
            module.__class__ = own_class(module)
            del module.together, module.place


class _Copies:
    """What a decoder's forward begins with; `hook` takes it away again."""

    hook: torch.utils.hooks.RemovableHandle

    def __init__(self, groups: list[SharedInput]) -> None:
        self.groups = groups

    def __call__(self, *_: object) -> None:
        copy_matrices(self.groups)


def _decoder(model: nn.Module) -> nn.Module:
    base = inner_model(model)
    return decoder_of(base) if isinstance(base, PreTrainedModel) else base


def why_not(layer: lora.LoraLayer, dtype: torch.dtype) -> str | None:
    """Returns why a layer stays on peft's path; None if it need not."""
    base = layer.get_base_layer()
    in_four_bits = bool(four_bit_linears(base))
    in_float8 = isinstance(base, FrozenFloat8Linear)
    whole = type(layer) is lora.Linear and (in_float8 or type(base) is nn.Linear)
    if not (whole or in_four_bits) or layer.fan_in_fan_out:
        return f"{type(base).__name__} under peft's {type(layer).__name__} has a product of its own"
    if reason := why_not_plain(layer):
        return reason
    if base.weight.requires_grad:
        return "the linear under LoRA trains"
    matrix = next(iter(layer.lora_A.values())).weight.dtype
    if matrix != dtype and dtype not in (torch.bfloat16, torch.float16):  # no autocast casts to it
        return f"LoRA's matrices are {matrix}, and the products {dtype}"
    if in_four_bits:
        from sftlab.fastpath import four_bit_lora

        if reason := four_bit_lora.why_not(layer, dtype):
            return reason
    elif in_float8:
        if reason := float8_lora.why_not(layer, dtype):
            return reason
    elif base.weight.dtype != dtype:
        return f"the weights are {base.weight.dtype}, and the products {dtype}"
    (dropout,) = layer.lora_dropout.values()
    if type(dropout) is nn.Dropout and base.in_features % 8:
        return "dropout needs inputs whose size is a multiple of 8"
    return None


def _group(layers: list[LoraProduct], far: bool) -> SharedInput:
    if isinstance(layers[0].base_layer, FrozenFloat8Linear):
        return float8_lora.Float8Input(layers, far)
    if not four_bit_linears(layers[0].base_layer):
        return SharedInput(layers, far)
    from sftlab.fastpath.four_bit_lora import FourBitInput

    return FourBitInput(layers, far)


def _sharing(model: nn.Module) -> Iterator[tuple[list[LoraProduct], bool]]:
    """Yields the layers that read one tensor, each layer once; alone where no other does.

    And whether their gradients are far from one another: q and k are rotated, each by itself.
    """
    found: set[nn.Module] = set()
    for parent in model.modules():
        for names in SIBLINGS:
            layers = [getattr(parent, name, None) for name in names]
            layers = [layer for layer in layers if isinstance(layer, LoraProduct)]
            alike = len({one.kind for one in layers}) == 1 and share_a_scale(layers)
            rank = padded(sum(layer.rank for layer in layers))
            if alike and len(layers) > 1 and rank <= LARGEST_SHARED_RANK:
                found.update(layers)
                yield layers, names == ATTENTION
    for module in model.modules():
        if isinstance(module, LoraProduct) and module not in found:
            yield [module], False
