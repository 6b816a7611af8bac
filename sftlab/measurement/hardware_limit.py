"""The measured matrix rate of a GPU, kept, and the model FLOPs utilisation (MFU) of a run."""

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from sftlab.files import write_json
from sftlab.paths import ROOT

# one rate for each machine, GPU, dtype and torch version
KEPT = ROOT / "data" / "matrix_rates.json"
MEASUREMENTS = 5
_SIZE, _PRODUCTS = 8192, 20


def significant(value: float) -> float:
    """Returns the value rounded to five significant digits, so that tiny rates do not become 0."""
    return float(f"{value:.5g}")


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOP/s of the fastest of several square matrix products on a GPU."""
    a, b = (torch.randn(_SIZE, _SIZE, device=device).to(dtype) for _ in range(2))
    return 2 * _SIZE**3 / min(_seconds(a, b) for _ in range(_PRODUCTS))


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    synchronize()
    start = time.perf_counter()
    torch.matmul(a, b)
    synchronize()
    return time.perf_counter() - start


def kept_rates(device: torch.device, dtype: torch.dtype) -> list[float]:
    """Returns the matrix rates of a GPU in TFLOP/s, lowest first, measured once and kept.

    A rate that was measured anew in every run would move the MFU of equal runs. Where the file
    cannot be written, the rates are measured anew.
    """
    gpu, name = torch.cuda.get_device_name(device), str(dtype).removeprefix("torch.")
    key = f"{platform.node()}, {gpu}, {name}, torch {torch.__version__}"
    known = _read(KEPT)
    if key not in known:
        rates = sorted(matrix_rate(device, dtype) / 1e12 for _ in range(MEASUREMENTS))
        known[key] = [round(rate, 2) for rate in rates]
        try:
            KEPT.parent.mkdir(parents=True, exist_ok=True)
            write_json(KEPT, known)
        except OSError:
            pass  # a folder that is read-only
    return known[key]


def _read(path: Path) -> dict[str, list[float]]:
    """Returns the kept rates; what is damaged is measured anew."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    kept = found if isinstance(found, dict) else {}
    return {
        key: rates
        for key, rates in kept.items()
        if isinstance(rates, list) and rates and all(type(one) in (int, float) for one in rates)
    }


def measure_mfu(
    facts: dict[str, Any], device: torch.device, dtype: torch.dtype, world_size: int
) -> dict[str, Any]:
    """Returns the matrix rate of one GPU and the run's MFU, under run.json's keys.

    `share_of_limit` is the MFU: model FLOP/s over all devices, divided by their matrix rate. It is
    None if no step was timed. `facts` holds `model_tflops_per_s`. A CPU has no MFU: what it
    reaches depends on what else it computes.
    """
    if device.type != "cuda":
        return {"limit": None, "limit_tflops_per_s": None, "share_of_limit": None}
    rates = kept_rates(device, dtype)
    rate, reached = statistics.median(rates), facts.get("model_tflops_per_s")
    return {
        "limit": f"measured {str(dtype).removeprefix('torch.')} matrix rate per device",
        "limit_tflops_per_s": round(rate, 2),
        "limit_range_tflops_per_s": [min(rates), max(rates)],
        "share_of_limit": significant(reached / (rate * world_size)) if reached else None,
    }


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
