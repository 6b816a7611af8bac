"""Which 4-bit linears have their weights given back by one kernel."""

import torch
from torch import nn

from sftlab.fastpath.selection import FastPath

ONE_KERNEL, BITSANDBYTES = "one kernel", "bitsandbytes"
SHARDED = "FSDP gathers the weights without their scales"


def take_four_bits(model: nn.Module, fast: FastPath, strategy: str, dtype: torch.dtype) -> None:
    """Let one kernel give 4-bit weights back where layers are compiled; note what does, and why.

    `dtype` is that of the products. Nothing is noted of a model without such weights.
    """
    layers = four_bit_linears(model)
    if not layers:
        return
    fast.four_bit_weights = BITSANDBYTES
    if not fast.compile_layers:
        return
    left = {SHARDED: len(layers)} if strategy == "fsdp" else swap(layers, dtype)
    if sum(left.values()) < len(layers):
        fast.four_bit_weights = ONE_KERNEL
    if left:
        reason = "; ".join(f"{n} of {len(layers)} linears: {why}" for why, n in left.items())
        fast.reasons["four_bit_kernel"] = f"for {reason}"


def four_bit_linears(model: nn.Module) -> list[nn.Module]:
    """Returns bitsandbytes' 4-bit linears of a model."""
    # without importing bitsandbytes where there are none
    return [one for one in model.modules() if "quant_state" in vars(one)]


def swap(layers: list[nn.Module], dtype: torch.dtype) -> dict[str, int]:
    """Give 4-bit linears the product of four_bit_linear.py, in place, if they are understood.

    All weights are compared with bitsandbytes' first, and the products of one layer of each kind.
    Parameters, their names and what is saved stay as they are. Returns how many layers keep
    bitsandbytes' forward, by reason.
    """
    from sftlab.fastpath import four_bit_linear

    left: dict[str, int] = {}
    kinds: dict[tuple, str | None] = {}
    for layer in layers:
        reason = four_bit_linear.why_not(layer, dtype) or four_bit_linear.weight_differs(layer)
        if reason is None:
            state, before = layer.weight.quant_state, type(layer)
            layer.__class__ = four_bit_linear.Linear4bit
            kind = (state.shape, state.dtype, state.quant_type, state.blocksize, state.nested)
            if kind not in kinds:
                kinds[kind] = four_bit_linear.product_differs(layer)
            reason = kinds[kind]
            if reason:
                layer.__class__ = before
        if reason:
            left[reason] = left.get(reason, 0) + 1
    return left
