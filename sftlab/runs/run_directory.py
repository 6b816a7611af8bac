"""The run directory and its run.json: the contract between training, evaluation, report and app."""

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from sftlab.files import file_hash, write_json
from sftlab.runs import progress, tensorboard_curves
from sftlab.runs.checkpoint_manifest import newest_valid, remove_all
from sftlab.runs.environment import environment

# the two models of a run, as evaluations name them
SIDES = ("base", "tuned")
STATUSES = ("running", "succeeded", "failed", "interrupted")
# recipe fields that may differ between an interrupted run and its continuation
_FREE_FIELDS = {
    "overwrite",
    "resume_anyway",
    "disable_tqdm",
    "log_level",
    "logging_first_step",
    "report_to",
    "dataset_num_proc",
    "output_dir",
    "logging_dir",
    "run_name",
    "save_total_limit",
    "save_adapter",
}


def read_run(folder: str | os.PathLike) -> dict[str, Any]:
    """Read run.json of a run directory. Raises ValueError where there is none."""
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no run directory: it has no run.json")
    return json.loads(path.read_text(encoding="utf-8"))


def adapter_hash(folder: str | os.PathLike) -> str | None:
    """Returns the SHA-256 of a run's adapter, weights and config (16 hexadecimal digits), or None.

    The order of names in a list of the config, which peft does not keep, makes no difference.
    """
    adapter = Path(folder) / "adapter"
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    if not weights.is_file():
        return None
    settings = config.read_bytes() if config.is_file() else b""
    try:
        found = json.loads(settings)
        for name, value in found.items():
            found[name] = sorted(value, key=str) if isinstance(value, list) else value
        settings = json.dumps(found, sort_keys=True).encode()
    except (ValueError, AttributeError, RecursionError):
        pass  # no JSON object: the bytes are what it is
    return hashlib.sha256(file_hash(weights).encode() + settings).hexdigest()[:16]


class Start(NamedTuple):
    """How a run starts: from which checkpoint, what must match its manifest, and warnings."""

    checkpoint: str | None
    must_match: dict[str, Any]
    warnings: list[str]


class Run:
    """One run's record. Rank 0 writes it, and any rank may record a failure."""

    def __init__(self, folder: str | os.PathLike, is_main: bool) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "run.json"
        self.is_main = is_main

    @property
    def adapter(self) -> Path:
        """Returns the folder of the adapter, tokenizer and template."""
        return self.folder / "adapter"

    def start(
        self, recipe: dict[str, Any], launch: dict[str, Any], overwrite: bool, anyway: bool = False
    ) -> Start:
        """Begin the run, or continue it from its newest valid checkpoint (rank 0 only).

        Raises ValueError where a finished run would be overwritten. It raises one too where an
        unfinished run had another recipe, launch config or versions, unless `anyway`; run.json
        then says what differed.
        """
        record, warnings = self._record()
        overwrite = overwrite and not _requeued(record)
        if not overwrite:
            self._refuse(record)
        found = newest_valid(self.folder) if not overwrite else None
        if found is None or found.folder is None:
            return self._begin(
                record, recipe, launch, overwrite, warnings + (found.set_aside if found else [])
            )
        manifest, now = found.manifest, environment()
        must = manifest["must_match"]
        differing = list(differences(must, must | must_match(recipe, launch, now)))
        self._refuse_unless(anyway, differing)
        computed_on = {"hardware": comparable(manifest["hardware"])}
        changed = [*differing, *differences(computed_on, {"hardware": comparable(now["hardware"])})]
        if changed:
            warnings.append(
                f"{self.folder} continues with {'; '.join(changed)}: it may differ from an "
                "uninterrupted run"
            )
        if "tensorboard" in (recipe.get("report_to") or []):
            warnings += self._restore_curves(found.folder, manifest)
        reached = (manifest["step"], manifest["train_seconds"])
        entry = self._interruption(record, str(found.folder), *reached, found.set_aside) | {
            "changed": changed
        }
        self._write(record, recipe, launch, now, [entry])
        return Start(str(found.folder), must, warnings + found.set_aside)

    def _restore_curves(self, checkpoint: Path, manifest: dict[str, Any]) -> list[str]:
        history = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))[
            "log_history"
        ]
        folder = self.folder / "tensorboard"
        lost = tensorboard_curves.restore(folder, history, manifest["step"], manifest["saved"])
        return (
            [f"{folder} lacked {lost} values and was written anew from {checkpoint.name}"]
            if lost
            else []
        )

    def check(self, start: Start, facts: dict[str, Any], anyway: bool) -> None:
        """Raise ValueError where `facts` differ from those of the continued run, unless `anyway`.

        They are facts that are known only after `start`.
        """
        if not start.checkpoint:
            return
        differing = list(differences({name: start.must_match.get(name) for name in facts}, facts))
        self._refuse_unless(anyway, differing)
        if differing and self.is_main:
            *before, last = read_run(self.folder)["interruptions"]
            self.update(interruptions=[*before, last | {"changed": last["changed"] + differing}])

    def _record(self) -> tuple[dict[str, Any] | None, list[str]]:
        """Returns run.json (None without one) and warnings.

        An unreadable one is moved aside and read as {}; the checkpoints have what is needed.
        """
        for left in self.folder.glob(".run.json.*"):
            left.unlink()
        try:
            record = read_run(self.folder) if self.path.is_file() else None
            if record is not None and not {"status", "recipe"} <= set(record):
                raise ValueError("it has no status or no recipe")
            return record, []
        except ValueError as error:
            aside = self.path.replace(self.folder / "broken-run.json")
            return {}, [f"{self.path} cannot be read ({error}) and was moved to {aside}"]

    def _refuse(self, record: dict[str, Any] | None) -> None:
        if record and record["status"] == "succeeded":
            raise ValueError(
                f"{self.folder} holds a finished run: pass --overwrite, or another --output_dir"
            )
        if record and record["status"] == "running" and _alive(record.get("host_pid")):
            raise ValueError(
                f"{self.folder} is being written by a running process ({record['host_pid'][1]})"
            )

    def _begin(
        self, record: dict | None, recipe: dict, launch: dict, overwrite: bool, warnings: list[str]
    ) -> Start:
        """Start at the first step. An interruption before the first checkpoint is recorded too."""
        again = record and not overwrite and not list(differences(record["recipe"], recipe))
        entries = [self._interruption(record, None, 0, 0.0, warnings)] if again else []
        if record is not None:  # otherwise the folder may hold a user's own files
            self._clear()
        self._write(record if again else None, recipe, launch, environment(), entries)
        return Start(None, {}, warnings)

    def _interruption(
        self,
        record: dict | None,
        checkpoint: str | None,
        step: int,
        seconds: float,
        aside: list[str],
    ) -> dict[str, Any]:
        """Returns an entry of `interruptions`: how the last start ended, and what that cost."""
        old = record or {}
        entry = {
            "status": old.get("status", "unknown"),
            "reason": old.get("reason"),
            "continued": _now(),
        }
        cost = progress.cost(progress.read(self.folder), step, seconds, time.time())
        return entry | {"from": checkpoint, "step": step, **cost, "set_aside": aside}

    def _write(
        self,
        old: dict | None,
        recipe: dict,
        launch: dict,
        now: dict[str, Any],
        entries: list[dict[str, Any]],
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        old = old or {}
        record = {"status": "running", "reason": None, "started": old.get("started", _now())}
        record["interruptions"] = [*old.get("interruptions", []), *entries]
        record |= {
            "host_pid": [socket.gethostname(), os.getpid()],
            "recipe": recipe,
            "launch": launch,
            **now,
        }
        write_json(self.path, record)

    def _refuse_unless(self, anyway: bool, differing: list[str]) -> None:
        if differing and not anyway:
            raise ValueError(
                f"{self.folder} holds an unfinished run with other settings: "
                f"{'; '.join(differing[:5])}. Start it with the same settings to continue it, with "
                "--resume_anyway to continue it with these (run.json will say so), with "
                "--overwrite to begin anew, or with another --output_dir"
            )

    def _clear(self) -> None:
        for name in ("adapter", ".adapter", "tensorboard", "eval"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        remove_all(self.folder)
        for name in ("run.json", progress.NAME):
            (self.folder / name).unlink(missing_ok=True)

    def update(self, **facts: Any) -> None:
        """Add facts to run.json (rank 0)."""
        if self.is_main:
            write_json(self.path, read_run(self.folder) | facts)

    def finish(self, status: str, **facts: Any) -> None:
        """Write the final status (rank 0)."""
        assert status in STATUSES
        self.update(status=status, finished=_now(), **facts)

    def fail(self, reason: str, rank: int | None) -> None:
        """Record a failure of a rank (None: from outside). The first recorded one stays."""
        if self.path.is_file():
            record = read_run(self.folder)
            if record["status"] == "running":
                record |= {
                    "status": "failed",
                    "reason": reason,
                    "failed_rank": rank,
                    "finished": _now(),
                }
                write_json(self.path, record)


def _requeued(record: Mapping[str, Any] | None) -> bool:
    """Whether Slurm restarts a job that began an unfinished run with overwrite.

    Such a run continues.
    """
    again = int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0
    return bool(
        again and record and record["status"] != "succeeded" and record["recipe"].get("overwrite")
    )


def must_match(
    recipe: Mapping[str, Any], launch: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns what must be the same for an exact continuation, as a manifest holds it.

    `now` is `environment()`.
    """
    asked = {name: launch.get(name) for name in ("precision", "strategy", "world_size")}
    found = {"recipe": dict(recipe), "launch": asked, "versions": now["versions"]}
    return json.loads(json.dumps(found, default=str))


def comparable(hardware: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the hardware that decides the order of sums, and so the last digits.

    That is the GPU, or without one the machine and its number of CPU cores.
    """
    return {
        name: hardware.get(name)
        for name in (("gpu",) if hardware.get("gpu") else ("cpu_cores", "machine"))
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield each difference in a few words. Settings that may differ are left out."""
    old, new = (json.loads(json.dumps(dict(one), default=str)) for one in (old, new))
    for name in sorted(set(old) | set(new)):
        was, is_ = old.get(name), new.get(name)
        if was == is_ or name in _FREE_FIELDS:
            continue
        if isinstance(was, dict) and isinstance(is_, dict):
            yield from differences(was, is_, "" if name == "recipe" else f"{prefix}{name} ")
        else:
            yield f"{prefix}{name} ({was!r} was, {is_!r} is)".replace(
                "launch world_size", "world size"
            )


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
