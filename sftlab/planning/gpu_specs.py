"""How much memory does a GPU have, and how fast is it? Published figures, and this machine's.

Rates are from the makers' data sheets: dense, without sparsity, of products that accumulate in
float32. Memory is what CUDA reports.
"""

import re
import time
from dataclasses import dataclass, replace

import torch

# Microseconds of a small operation on the host where the planner's constants were measured.
HOST_US = 3.7


@dataclass(frozen=True)
class GPU:
    """Memory in GB (2**30 bytes), TFLOP/s by precision, GB/s (10**9) of memory and of one link.

    `seen_as` are names that CUDA gives it. `host_us` is the time of a small operation on its host,
    in microseconds; launching kernels scales with it.
    """

    name: str
    memory_gb: float
    capability: tuple[int, int]
    fp32: float
    half: float
    fp8: float | None
    memory_gbs: float
    link_gbs: float
    seen_as: tuple[str, ...] = ()
    host_us: float = HOST_US

    def tflops(self, precision: str) -> float:
        """Returns the published TFLOP/s of matrix products in a launch config's precision."""
        return {"fp32": self.fp32, "fp8": self.fp8 or self.half}.get(precision, self.half)


# name, memory, compute capability, TFLOP/s in fp32, in fp16 or bf16, in fp8, GB/s of the memory, of
# a link in one direction
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("b200", 178.4, (10, 0), 75, 2250, 4500, 8000, 900, ("B200",)),
        GPU("h200", 139.8, (9, 0), 67, 989, 1979, 4800, 450, ("H200",)),
        GPU("h100-80", 79.2, (9, 0), 67, 989, 1979, 3350, 450, ("H100",)),
        GPU("h100-pcie", 79.2, (9, 0), 51, 756, 1513, 2000, 64, ("H100 PCIe",)),
        GPU("a100-80", 79.2, (8, 0), 19.5, 312, None, 2039, 300, ("A100-SXM4-80GB", "A100 80GB")),
        GPU(
            "a100-40",
            39.4,
            (8, 0),
            19.5,
            312,
            None,
            1555,
            300,
            ("A100-SXM4-40GB", "A100-PCIE-40GB"),
        ),
        GPU("l40s", 44.4, (8, 9), 91.6, 362, 733, 864, 32, ("L40S",)),
        GPU("l4", 22.0, (8, 9), 30.3, 121, 242, 300, 32, ("L4",)),
        GPU("a10", 22.0, (8, 6), 31.2, 125, None, 600, 32, ("A10",)),
        GPU("rtx6000-ada", 47.4, (8, 9), 91.1, 364, 728, 960, 32, ("RTX 6000 Ada",)),
        GPU("rtx4090", 23.5, (8, 9), 82.6, 165, 330, 1008, 32, ("RTX 4090",)),
        GPU("rtx3090", 23.6, (8, 6), 35.6, 71, None, 936, 32, ("RTX 3090",)),
        GPU(
            "v100-32", 31.7, (7, 0), 15.7, 125, None, 900, 150, ("V100-SXM2-32GB", "V100-PCIE-32GB")
        ),
        GPU(
            "v100-16", 15.8, (7, 0), 15.7, 125, None, 900, 150, ("V100-SXM2-16GB", "V100-PCIE-16GB")
        ),
        GPU("t4", 14.6, (7, 5), 8.1, 65, None, 320, 16, ("T4",)),
    )
}
MEASURED_ON = "h200"
# How far apart the memory of two GPUs of one name may be: drivers and error correction take some.
SAME_MEMORY = 0.08
# Words for other GPUs than the one whose name they follow.
_OTHERS = {"nvl", "laptop", "mobile", "max", "mig", "super", "ti", "d"}


def find_gpu(name: str) -> GPU:
    """Returns a GPU by its name in GPUS, or for `here` this machine's first GPU with its host.

    Raises ValueError, with the known names, for any other.
    """
    if name.lower() != "here":
        return _named(name)
    if not torch.cuda.is_available():
        raise ValueError(f"--gpu here: this machine shows no GPU; name one of {', '.join(GPUS)}")
    seen = torch.cuda.get_device_name(0)
    memory_gb = torch.cuda.get_device_properties(0).total_memory / 2**30
    found = gpu_seen_as(seen)
    # a slice of a GPU, or a laptop's GPU, has the same name and less memory
    if not found or abs(memory_gb / found.memory_gb - 1) > SAME_MEMORY:
        raise ValueError(
            f"--gpu here: no figures for {seen}, {memory_gb:.1f} GB; name the nearest of "
            f"{', '.join(GPUS)}"
        )
    return replace(found, memory_gb=round(memory_gb, 1), host_us=measure_host())


def _named(name: str) -> GPU:
    """Returns the GPU that a person calls `name`: `4090`, `RTX 4090`, `A100 80GB`, `h100-sxm`."""
    if exact := GPUS.get(name.lower()):
        return exact
    asked = _words(name)
    fits = []
    if not _OTHERS & set(asked.split()) and re.search(r"[a-z]|\d{4}", asked):
        fits = [gpu for gpu in GPUS.values() if _calls(asked, gpu)]
        seen = gpu_seen_as(name)
        fits = [seen] if seen and not fits else fits
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise ValueError(f"--gpu {name} may be {' or '.join(gpu.name for gpu in fits)}: name one")
    raise ValueError(
        f"no figures for GPU {name!r}: known are {', '.join(GPUS)} and here (this machine's)"
    )


def _calls(asked: str, gpu: GPU) -> bool:
    """Returns whether the words stand in one of the GPU's names, with or without their spaces."""
    pattern = rf"(?<![0-9])(?<!\bg){asked}(?![0-9a-z])"
    names = [_words(one) for one in (gpu.name, *gpu.seen_as)]
    joined = asked.replace(" ", "")
    return any(re.search(pattern, one) or one.replace(" ", "") == joined for one in names)


def _words(name: str) -> str:
    """Returns a name in lower case without its maker and series."""
    plain = re.sub(r"nvidia|tesla|geforce|quadro|generation", "", name.lower())
    plain = re.sub(r"(?<=[0-9])gb\b", "", plain)
    return " ".join(re.findall(r"[a-z0-9]+", plain))


def gpu_seen_as(name: str) -> GPU | None:
    """Returns the GPU that CUDA calls `name`; None for an unknown one."""
    # the longest name that fits: "H100 PCIe" before "H100"
    fits = {
        words: gpu
        for gpu in GPUS.values()
        for words in gpu.seen_as
        if re.search(rf"(?<!\w){words}(?!\w)", name)
    }
    return fits[max(fits, key=len)] if fits else None


def measure_host() -> float:
    """Returns the microseconds that this host takes for a small operation.

    It is the least over a second, as other processes disturb it.
    """
    small, count, times = torch.zeros(8), 1000, []
    began = time.perf_counter()
    while time.perf_counter() - began < 1.0:
        start = time.perf_counter()
        for _ in range(count):
            small.add_(1.0)
        times.append(time.perf_counter() - start)
        time.sleep(0.01)
    return round(min(times) / count * 1e6, 2)
