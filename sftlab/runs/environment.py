"""Hardware, versions and commit of this process."""

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sftlab.cpu_cores import cpu_cores
from sftlab.paths import ROOT

_PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "torchao",
)


def environment() -> dict[str, Any]:
    """Returns the versions, git commit and hardware of this process, and its Slurm job's number."""
    import torch

    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    hardware: dict[str, Any] = {
        "cpu_cores": cpu_cores(),
        "machine": platform.machine(),
    }
    if torch.cuda.is_available():
        versions["cuda"] = torch.version.cuda
        hardware["gpu"] = torch.cuda.get_device_name(0)
        hardware["gpus_visible"] = torch.cuda.device_count()
        hardware["gpu_memory_gb"] = round(
            torch.cuda.get_device_properties(0).total_memory / 2**30, 1
        )
    job = {"slurm_job": os.environ["SLURM_JOB_ID"]} if "SLURM_JOB_ID" in os.environ else {}
    return {"versions": versions, "git_commit": _git_commit(), "hardware": hardware, **job}


def provenance(others: Sequence[str] = ()) -> dict[str, str]:
    """Returns hardware and versions of this process as columns of a results table.

    `others` are packages whose versions are told too, where they are installed.
    """
    facts = environment()
    for package in others:
        with suppress(PackageNotFoundError):
            facts["versions"][package] = version(package)
    hardware = facts["hardware"].get("gpu") or f"{facts['hardware']['cpu_cores']} CPU cores"
    return {
        "hardware": hardware,
        "versions": " ".join(f"{k} {v}" for k, v in facts["versions"].items()),
    }


def typed_command(script: str, words: Sequence[str]) -> str:
    """Returns the command as a table quotes it: without --out, which comes last."""
    return shlex.join(["python", script, *words]).partition(" --out")[0]


def machine_name() -> str:
    """Returns `cpu`, or the short name of the GPU in lower case: h200 for NVIDIA H200."""
    gpu = environment()["hardware"].get("gpu")
    return gpu.removeprefix("NVIDIA ").split()[0].lower() if gpu else "cpu"


def _git_commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
