"""The measured matrix rate of a device, and the model FLOPs utilisation (MFU) of a run."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

# Sizes grow until a product takes longer than this; the next one would take eight times as long.
QUICK_S = 0.05


def significant(value: float) -> float:
    """Returns the value rounded to five significant digits, so that tiny rates do not become 0."""
    return float(f"{value:.5g}")


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOP/s of the fastest of several square matrix products of random data.

    A CPU multiplies as a linear layer does, in growing sizes while they are quick. Without 16-bit
    instructions a product of size 2,048 takes a second, and a minute if the second matrix is not
    transposed.
    """
    on_gpu = device.type == "cuda"
    sizes, repeats, product = (
        ((8192,), 20, torch.matmul) if on_gpu else ((256, 512, 1024, 2048), 5, F.linear)
    )
    best = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = min(_seconds(product, a, b) for _ in range(repeats))
        best = max(best, 2 * size**3 / seconds)
        if seconds > QUICK_S:
            break
    return best


def _seconds(product: Callable[..., torch.Tensor], a: torch.Tensor, b: torch.Tensor) -> float:
    synchronize()
    start = time.perf_counter()
    product(a, b)
    synchronize()
    return time.perf_counter() - start


def measure_mfu(
    facts: dict[str, Any], device: torch.device, dtype: torch.dtype, world_size: int
) -> dict[str, Any]:
    """Returns the matrix rate of one device and the run's MFU, under run.json's keys.

    `share_of_limit` is the MFU: model FLOP/s over all devices, divided by their measured matrix
    rate. It is None if no step was timed. `facts` holds `model_tflops_per_s`.
    """
    rate = matrix_rate(device, dtype) / 1e12
    reached = facts.get("model_tflops_per_s")
    return {
        "limit": f"measured {str(dtype).removeprefix('torch.')} matrix rate per device",
        "limit_tflops_per_s": round(rate, 2),
        "share_of_limit": significant(reached / (rate * world_size)) if reached else None,
    }


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
