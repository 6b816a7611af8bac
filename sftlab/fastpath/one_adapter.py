"""A LoRA layer of peft with one adapter and no more: what it adds, and when."""

import torch
from peft.tuners import lora
from torch import nn


def why_not_plain(layer: lora.LoraLayer) -> str | None:
    """Returns why a layer adds something else than s dropout(x) A^T B^T; None if it does not."""
    if not has_one_adapter(layer):
        return "there are several adapters, as in preference tuning from an adapter"
    if any(layer.lora_bias.values()):
        return "LoRA has a bias"
    if layer.lora_variant:
        variant = next(iter(layer.lora_variant.values()))
        return f"{type(variant).__name__} changes the LoRA update"
    (dropout,) = layer.lora_dropout.values()
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"{type(dropout).__name__} is not the dropout of LoRA"
    return None


def adapts(layer: lora.LoraLayer) -> bool:
    """Whether it adds its one adapter to a frozen linear that nobody watches."""
    if layer._disable_adapters or layer.merged_adapters or layer.base_layer._forward_hooks:
        return False
    return has_one_adapter(layer) and layer.active_adapters == list(layer.lora_A)


def has_one_adapter(layer: lora.LoraLayer) -> bool:
    """Whether no second adapter was added."""
    return len(layer.lora_A) == 1


def matrices(layer: lora.LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and B [out, rank]."""
    (a,), (b,) = layer.lora_A.values(), layer.lora_B.values()
    return a.weight, b.weight


def rank(layer: lora.LoraLayer) -> int:
    """The rank of its adapter."""
    (found,) = layer.r.values()
    return found


def scale(layer: lora.LoraLayer) -> float:
    """What the LoRA update is multiplied with."""
    (found,) = layer.scaling.values()
    return found


def dropped(layer: lora.LoraLayer) -> float:
    """The probability with which dropout zeroes an element of LoRA's input."""
    (dropout,) = layer.lora_dropout.values()
    return dropout.p if isinstance(dropout, nn.Dropout) else 0.0


def product_dtype(layer: lora.LoraLayer, device: str) -> torch.dtype:
    """The dtype in which its matrices are multiplied on a device of this type: that of autocast."""
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return matrices(layer)[0].dtype
