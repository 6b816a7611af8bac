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
    left: dict[str, int] = {}
    kinds: dict[tuple, str | None] = {}
    for layer in layers:
        before = type(layer)
        try:
            reason = _why_not(layer, dtype, kinds)
        except _failures() as error:
            reason = f"the kernel does not run here: {' '.join(str(error).split())[:200]}"
        if reason:
            layer.__class__ = before
            left[reason] = left.get(reason, 0) + 1
    return left


def _why_not(layer: nn.Module, dtype: torch.dtype, kinds: dict[tuple, str | None]) -> str | None:
    """Returns why a layer, which gets the product here, may not keep it.

    `kinds` holds how the products of other layers differ, by kind.
    """
    from sftlab.fastpath import four_bit_linear

    if reason := four_bit_linear.why_not(layer, dtype) or four_bit_linear.weight_differs(layer):
        return reason
    layer.__class__ = four_bit_linear.Linear4bit
    state = layer.weight.quant_state
    kind = (state.shape, state.dtype, state.quant_type, state.blocksize, state.nested)
    if kind not in kinds:
        kinds[kind] = four_bit_linear.product_differs(layer)
    return kinds[kind]


def _failures() -> tuple[type[Exception], ...]:
    """Returns what a kernel raises that Triton cannot compile or the GPU cannot run."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return ImportError, RuntimeError
    return RuntimeError, TritonError
