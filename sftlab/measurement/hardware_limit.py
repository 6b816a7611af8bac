"""How fast a matrix product is on this device, and the model FLOPs utilisation (MFU) that follows."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

QUICK_S = 0.05  # a product of twice the size takes eight times as long


def significant(value: float) -> float:
    """Five digits: of a tiny model on a busy machine too."""
    return float(f"{value:.5g}")


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product of random data on `device`: the best of several, as a limit
    is.

    A CPU does a linear layer's product, of growing sizes while they are quick: without instructions
    for 16 bits one of size 2,048 takes a second, and a minute with its second matrix in the other
    order.
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


def share_of_limit(
    facts: dict[str, Any], device: torch.device, dtype: torch.dtype, world_size: int
) -> dict[str, Any]:
    """The measured matrix rate of one device and the share of it that the run's model FLOPs
    reached.
    """
    rate = matrix_rate(device, dtype) / 1e12
    reached = facts.get("model_tflops_per_s")
    return {
        "limit": f"measured {str(dtype).removeprefix('torch.')} matrix rate a device",
        "limit_tflops_per_s": round(rate, 2),
        "share_of_limit": significant(reached / (rate * world_size)) if reached else None,
    }


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
