"""Which 4-bit linears have their weights given back by one kernel."""

from types import ModuleType

import torch
from torch import nn

from sftlab.fastpath.float8 import multiplies_in_float8
from sftlab.fastpath.selection import FastPath

ONE_KERNEL, BITSANDBYTES, FLOAT8 = "one kernel", "bitsandbytes", "one kernel, float8"
SHARDED = "FSDP gathers the weights without their scales"


def take_four_bits(
    model: nn.Module, fast: FastPath, strategy: str, dtype: torch.dtype, float8: bool = False
) -> None:
    """Let one kernel give 4-bit weights back where layers are compiled; note what does, and why.

    `dtype` is that of the products. With `float8` they run in it, compiled or not. Nothing is noted
    of a model without such weights. Raises ValueError where no linear can multiply in float8.
    """
    layers = four_bit_linears(model)
    if not layers:
        return
    if float8:
        _take_float8(layers, fast, dtype)
        return
    fast.four_bit_weights = BITSANDBYTES
    if not fast.compile_layers:
        return
    left = {SHARDED: len(layers)} if strategy == "fsdp" else swap(layers, dtype)
    if sum(left.values()) < len(layers):
        fast.four_bit_weights = ONE_KERNEL
    if left:
        fast.reasons["four_bit_kernel"] = _reason(left, layers)


def _take_float8(layers: list[nn.Module], fast: FastPath, dtype: torch.dtype) -> None:
    left = swap(layers, dtype, float8=True)
    if sum(left.values()) == len(layers):
        raise ValueError(
            f"fp8: no linear in 4 bits can multiply in float8 ({'; '.join(left)}): launch with "
            "single.yaml"
        )
    fast.four_bit_weights = FLOAT8
    if left:
        fast.reasons["four_bit_float8"] = _reason(left, layers)
    if fast.compile_layers:  # the others, in 16 bits
        swap([one for one in layers if not multiplies_in_float8(one)], dtype)


def _reason(left: dict[str, int], layers: list[nn.Module]) -> str:
    return "for " + "; ".join(f"{n} of {len(layers)} linears: {why}" for why, n in left.items())


def four_bit_linears(model: nn.Module) -> list[nn.Module]:
    """Returns bitsandbytes' 4-bit linears of a model."""
    # without importing bitsandbytes where there are none
    return [one for one in model.modules() if "quant_state" in vars(one)]


def swap(layers: list[nn.Module], dtype: torch.dtype, float8: bool = False) -> dict[str, int]:
    """Give 4-bit linears the product of four_bit_linear.py, in place, if they are understood.

    With `float8` it is that of four_bit_float8.py. All weights are compared with bitsandbytes'
    first, and the products of one layer of each kind. Parameters, their names and what is saved
    stay as they are. Returns how many layers keep bitsandbytes' forward, by reason.
    """
    if float8:
        from sftlab.fastpath import four_bit_float8 as product
    else:
        from sftlab.fastpath import four_bit_linear as product
    left: dict[str, int] = {}
    kinds: dict[tuple, str | None] = {}
    for layer in layers:
        before = type(layer)
        try:
            reason = _why_not(layer, dtype, kinds, product)
        except _failures() as error:
            reason = f"the kernel does not run here: {' '.join(str(error).split())[:200]}"
        if reason:
            layer.__class__ = before
            for name in ("scale", "how"):
                vars(layer).pop(name, None)
            left[reason] = left.get(reason, 0) + 1
    return left


def _why_not(
    layer: nn.Module, dtype: torch.dtype, kinds: dict[tuple, str | None], product: ModuleType
) -> str | None:
    """Returns why a layer, which gets the product here, may not keep it.

    `kinds` holds how the products of other layers differ, by kind. `product` is four_bit_linear or
    four_bit_float8.
    """
    if reason := product.why_not(layer, dtype):
        return reason
    product.take(layer)
    if reason := product.weight_differs(layer):
        return reason
    state = layer.weight.quant_state
    kind = (state.shape, state.dtype, state.quant_type, state.blocksize, state.nested)
    if kind not in kinds:
        kinds[kind] = product.product_differs(layer)
    return kinds[kind]


def _failures() -> tuple[type[Exception], ...]:
    """Returns what a kernel raises that Triton cannot compile or the GPU cannot run."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return ImportError, RuntimeError
    return RuntimeError, TritonError
