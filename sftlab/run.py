"""The run directory and its run.json: the contract between training, evaluation, report and app."""

import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# the two models of a run, as evaluations name them
SIDES = ("base", "tuned")
STATUSES = ("running", "succeeded", "failed", "interrupted")
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "torchao")
# What may differ between an interrupted run and its continuation.
_FREE_FIELDS = {"overwrite", "disable_tqdm", "log_level", "logging_first_step", "report_to", "dataset_num_proc"}


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False, default=str)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_run(folder: str | os.PathLike) -> dict[str, Any]:
    """run.json of a run directory; ValueError where there is none."""
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no run directory: it has no run.json")
    return json.loads(path.read_text(encoding="utf-8"))


def adapter_hash(folder: str | os.PathLike) -> str | None:
    """SHA-256 of the weights of a run's adapter (hexadecimal, 16 digits); None where there are none."""
    weights = Path(folder) / "adapter" / "adapter_model.safetensors"
    if not weights.is_file():
        return None
    with weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


class Run:
    """One run's record. Rank 0 writes it; any rank may say that the run failed."""

    def __init__(self, folder: str | os.PathLike, is_main: bool) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "run.json"
        self.is_main = is_main

    @property
    def adapter(self) -> Path:
        """Where the adapter, tokenizer and template are saved."""
        return self.folder / "adapter"

    def start(self, recipe: dict[str, Any], launch: dict[str, Any], overwrite: bool) -> str | None:
        """Begin or continue (rank 0 only); returns the checkpoint to continue from, if there is one.

        Raises ValueError where a finished run would be overwritten, or where the run that would be continued had
        another recipe or world size.
        """
        old = read_run(self.folder) if self.path.is_file() else None
        checkpoint = None if overwrite else self._checkpoint_to_continue(old, recipe, launch)
        if old and not checkpoint:
            self._clear()
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"status": "running", "reason": None, "started": _now(), "interruptions": []}
        if old and checkpoint:
            record["started"] = old["started"]
            entry = {"status": old["status"], "reason": old.get("reason"), "continued": _now(), "from": checkpoint}
            record["interruptions"] = [*old.get("interruptions", []), entry]
        record |= {"host_pid": [socket.gethostname(), os.getpid()], "recipe": recipe, "launch": launch, **environment()}
        write_json(self.path, record)
        return checkpoint

    def _checkpoint_to_continue(self, old: dict | None, recipe: dict, launch: dict) -> str | None:
        if old is None:
            return None
        if old["status"] == "succeeded":
            raise ValueError(f"{self.folder} holds a finished run: pass --overwrite, or another --output_dir")
        if old["status"] == "running" and _alive(old.get("host_pid")):
            raise ValueError(f"{self.folder} is being written by a running process ({old['host_pid'][1]})")
        checkpoint = newest_checkpoint(self.folder)
        if checkpoint is None:
            return None
        differing = list(_differences(old["recipe"], recipe))
        if old["launch"]["world_size"] != launch["world_size"]:
            differing.append(f"world size ({old['launch']['world_size']} was, {launch['world_size']} is)")
        if differing:
            raise ValueError(
                f"{self.folder} holds an unfinished run with other settings: {'; '.join(differing[:5])}. Start it with "
                f"the same settings to continue it, with --overwrite to begin anew, or with another --output_dir"
            )
        return checkpoint

    def _clear(self) -> None:
        for name in ("adapter", "tensorboard", "eval"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for checkpoint in self.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        self.path.unlink()

    def update(self, **facts: Any) -> None:
        """Add facts to run.json (rank 0)."""
        if self.is_main:
            write_json(self.path, read_run(self.folder) | facts)

    def finish(self, status: str, **facts: Any) -> None:
        """Write the final status (rank 0)."""
        assert status in STATUSES
        self.update(status=status, finished=_now(), **facts)

    def fail(self, reason: str, rank: int | None) -> None:
        """Record a failure, from any rank or from outside (None); the first one stands."""
        if self.path.is_file():
            record = read_run(self.folder)
            if record["status"] == "running":
                record |= {"status": "failed", "reason": reason, "failed_rank": rank, "finished": _now()}
                write_json(self.path, record)


def newest_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint whose trainer state, which is written after the weights, can be read."""
    steps = {int(p.name.rpartition("-")[2]): p for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()}
    for step in sorted(steps, reverse=True):
        try:
            json.loads((steps[step] / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(steps[step])
    return None


def environment() -> dict[str, Any]:
    """Versions, git commit and hardware of this process."""
    import torch

    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    hardware: dict[str, Any] = {"cpu_cores": len(os.sched_getaffinity(0)), "machine": platform.machine()}
    if torch.cuda.is_available():
        versions["cuda"] = torch.version.cuda
        hardware["gpu"] = torch.cuda.get_device_name(0)
        hardware["gpus_visible"] = torch.cuda.device_count()
        hardware["gpu_memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    return {"versions": versions, "git_commit": _git_commit(), "hardware": hardware}


def provenance() -> dict[str, str]:
    """Hardware and versions of this process, as columns of a table of results."""
    facts = environment()
    hardware = facts["hardware"].get("gpu") or f"{facts['hardware']['cpu_cores']} CPU cores"
    return {"hardware": hardware, "versions": " ".join(f"{k} {v}" for k, v in facts["versions"].items())}


def _git_commit() -> str | None:
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterable[str]:
    new = json.loads(json.dumps(new, default=str))
    for name in sorted(set(old) | set(new)):
        if name not in _FREE_FIELDS and old.get(name) != new.get(name):
            yield f"{name} ({old.get(name)!r} was, {new.get(name)!r} is)"


def _alive(host_pid: list | None) -> bool:
    if not host_pid or host_pid[0] != socket.gethostname() or host_pid[1] == os.getpid():
        return False
    try:
        command = Path(f"/proc/{host_pid[1]}/cmdline").read_bytes()
    except OSError:
        return False
    return b"sft.py" in command


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
