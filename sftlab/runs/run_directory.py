"""The run directory and its run.json: the contract between training, evaluation, report and app."""

import hashlib
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sftlab.files import file_hash, write_json
from sftlab.models.identity import base_identity
from sftlab.runs import progress, run_lock
from sftlab.runs.checkpoint_manifest import foreign, in_order, newest_valid, set_aside
from sftlab.runs.clearing import clear, own_curves
from sftlab.runs.environment import environment
from sftlab.runs.extension import extended, refuse_extension, steps_of
from sftlab.runs.made_files import EVALUATIONS, MadeFiles, free_name, walk
from sftlab.runs.matching import comparable, differences, must_match
from sftlab.runs.ownership import PARTS, existing_record, refuse_unlisted
from sftlab.runs.record import RECORD, STATUSES, read_run
from sftlab.runs.start import Start, interruption, max_steps, now_utc
from sftlab.runs.tensorboard_curves import restore

# the two models of a run, as evaluations name them
SIDES = ("base", "tuned")
# the model that a run went on from, between the two
START = "start"
ENDED = {"running": "did not end", "failed": "failed", "interrupted": "was interrupted"}
# what to change where a training diverged
REMEDY = (
    "Change something first: a lower --learning_rate, more --warmup_steps, --max_grad_norm 1, or "
    "bf16 instead of fp16; --resume_anyway true continues with the change"
)


def adapter_hash(folder: str | os.PathLike) -> str | None:
    """Returns the SHA-256 of a run's adapter, weights and config (16 hexadecimal digits), or None.

    After full fine-tuning it is of the tuned model. The order of names in a list of the config,
    which peft does not keep, makes no difference.
    """
    adapter = Path(folder) / "adapter"
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    if not weights.is_file():
        whole = (adapter / "config.json").is_file() and any(adapter.glob("model*.safetensors"))
        return base_identity(str(adapter), None) if whole else None
    settings = config.read_bytes() if config.is_file() else b""
    try:
        found = json.loads(settings)
        for name, value in found.items():
            found[name] = sorted(value, key=str) if isinstance(value, list) else value
        settings = json.dumps(found, sort_keys=True).encode()
    except (ValueError, AttributeError, RecursionError):
        pass  # no JSON object: the bytes are what it is
    return hashlib.sha256(file_hash(weights).encode() + settings).hexdigest()[:16]


class Run:
    """One run's record. Rank 0 writes it, and any rank may record a failure."""

    def __init__(self, folder: str | os.PathLike, is_main: bool) -> None:
        self.folder = Path(folder)
        self.path = self.folder / RECORD
        self.is_main = is_main
        self.made = MadeFiles(self.folder)
        self.began: bool | None = None  # None: this process was not there

    @property
    def adapter(self) -> Path:
        """Returns the folder of the adapter, tokenizer and template."""
        return self.folder / "adapter"

    def look(
        self,
        recipe: dict[str, Any],
        launch: dict[str, Any],
        overwrite: bool,
        anyway: bool = False,
        extend: bool = False,
    ) -> Start:
        """Find out how the run starts, or continues. Changes nothing (rank 0 only).

        Raises ValueError for a folder that is not a run's, for a damaged run.json, while another
        process trains there, and where a finished run would be replaced. It raises one too where an
        unfinished run had another recipe, launch config or versions, unless `anyway`; run.json
        then says what differed. With `extend`, a finished run goes on to a larger number of steps.
        """
        if extend and overwrite:
            raise ValueError("extend and overwrite are both true: give one of them")
        self.began = False
        run_lock.refuse_held(self.folder)
        record = existing_record(self.folder)
        start = Start(record=record, seen=self._seen())
        start.overwrite = overwrite and not _requeued(record)
        start.warnings += [
            f"{path} was not made by this run: it is left as it is" for path in foreign(self.folder)
        ]
        if start.overwrite:
            refuse_unlisted(self.folder)
            start.at_stake = self._trained() or bool(in_order(self.folder))
            return start
        if record and record["status"] == "succeeded":
            if not extend:
                raise ValueError(
                    f"{self.folder} holds a finished run: pass --overwrite, another --output_dir, "
                    "or --extend with more steps or epochs"
                )
            refuse_extension(record, recipe, self.folder)
        found = newest_valid(self.folder)
        start.invalid = found.invalid
        if found.folder is None:
            self._refuse_lone_adapter(record)
            start.warnings += self._diverged(record, None)
            return start
        self._continue(start, found.folder, found.manifest, recipe, launch, anyway, extend)
        start.warnings += self._diverged(record, found.folder)
        return start

    def _continue(
        self,
        start: Start,
        checkpoint: Path,
        manifest: dict[str, Any],
        recipe: dict[str, Any],
        launch: dict[str, Any],
        anyway: bool,
        extend: bool,
    ) -> None:
        now, must, length = environment(), manifest["must_match"], ""
        if extend:
            must, length = extended(must, recipe)
        differing = list(differences(must, must | must_match(recipe, launch, now)))
        self._refuse_unless(anyway, differing)
        computed_on = {"hardware": comparable(manifest["hardware"])}
        start.changed = [
            *([length] if length else []),
            *differing,
            *differences(computed_on, {"hardware": comparable(now["hardware"])}),
        ]
        if start.changed:
            start.warnings.append(
                f"{self.folder} continues with {'; '.join(start.changed)}: it may differ from an "
                "uninterrupted run"
            )
        start.checkpoint, start.must_match, start.manifest = str(checkpoint), must, manifest
        steps = steps_of(recipe) if extend else max_steps(checkpoint)
        left = f" of {steps:,}, {max(0, steps - manifest['step']):,} left" if steps else ""
        start.says.append(
            f"{self.folder} continues from {checkpoint.name}: {manifest['step']:,} steps done{left}"
            f" ({manifest['train_seconds']:,.0f} s of training so far)"
        )

    def check(self, start: Start, facts: dict[str, Any], anyway: bool) -> None:
        """Raise ValueError where `facts` differ from those of the continued run, unless `anyway`.

        They are facts that are known only after `look`, such as the data.
        """
        if not start.checkpoint:
            return
        differing = list(differences({name: start.must_match.get(name) for name in facts}, facts))
        self._refuse_unless(anyway, differing)
        start.changed += differing

    def begin(
        self, start: Start, recipe: dict[str, Any], launch: dict[str, Any], **facts: Any
    ) -> list[str]:
        """Begin or continue the run as `start` says (rank 0 only): lock, clear, write run.json.

        Returns warnings. Raises ValueError if another process began one meanwhile.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"--output_dir {self.folder} cannot be made: {error.strerror}"
            ) from error
        run_lock.acquire(self.folder)
        if self._seen() != start.seen:
            run_lock.release(self.folder)
            raise ValueError(
                f"{self.path} was written by another process meanwhile: start again once that one "
                "has ended"
            )
        self.began = True
        record, now, entries = start.record, environment(), []
        aside = [] if start.overwrite else set_aside(self.folder, start.invalid)
        for left in self.folder.iterdir():
            if PARTS.fullmatch(left.name):
                left.unlink()
        reached, unknown = self._reached()
        warnings = aside + unknown
        curves = own_curves(self.folder)
        if start.overwrite:
            clear(self.folder)
        self._note()
        if start.manifest:
            if "tensorboard" in (recipe.get("report_to") or []):
                warnings += self._restore_curves(Path(start.checkpoint), start.manifest, curves)
            at = (start.manifest["step"], start.manifest["train_seconds"])
            entry = interruption(record, start.checkpoint, reached, *at, aside)
            entries = [entry | {"changed": start.changed}]
        else:
            for path in [*curves, self.folder / progress.NAME]:
                path.unlink(missing_ok=True)
            if start.overwrite or not record or list(differences(record["recipe"], recipe)):
                record = None
            else:
                entries = [interruption(record, None, reached, 0, 0.0, aside)]
        self._write(record, recipe, launch, now | facts, entries)
        return warnings

    def made_bytes(self) -> int:
        """Returns the size of what the run made."""
        folders = [*in_order(self.folder), self.adapter]
        return sum(path.lstat().st_size for folder in folders for path in walk(folder))

    def release(self) -> None:
        """Let other processes train in this folder."""
        run_lock.release(self.folder)

    def way_on(self) -> str:
        """Returns a sentence that says how an unfinished run goes on."""
        last = in_order(self.folder)
        if last:
            return (
                f"To go on, start the same command again: it continues from {last[-1].name} in "
                f"{self.folder}."
            )
        if self._trained():
            return (
                f"The adapter is saved in {self.adapter}; there is no checkpoint. To train again, "
                "start the same command with --overwrite."
            )
        return (
            f"{self.folder} has no checkpoint yet: the same command begins again at the first step."
        )

    def _trained(self) -> bool:
        return (self.adapter / "adapter_model.safetensors").is_file() or (
            self.adapter / "model.safetensors"
        ).is_file()

    def _refuse_lone_adapter(self, record: dict[str, Any] | None) -> None:
        if self._trained():
            how = f"a run that {ENDED[record['status']]}" if record else "a run without run.json"
            raise ValueError(
                f"{self.adapter} was trained by {how}, and there is no checkpoint to continue "
                "from: pass --overwrite to train it again, or another --output_dir"
            )

    def _diverged(self, record: dict[str, Any] | None, checkpoint: Path | None) -> list[str]:
        reason = (record or {}).get("reason") or ""
        if "diverged: " not in reason:
            return []
        place = f"from {checkpoint.name}, which is finite" if checkpoint else "at the first step"
        return [
            f"the last start of {self.folder} ended as it {reason.rstrip('.')}: it starts again "
            f"{place}, and may end so again. {REMEDY}"
        ]

    def _seen(self) -> bytes | None:
        return self.path.read_bytes() if self.path.is_file() else None

    def _note(self) -> None:
        """List what this start, and later evaluations, will make."""
        curves = f"tensorboard/events.out.tfevents.*.{socket.gethostname()}.{os.getpid()}.*"
        self.made.note([RECORD, progress.NAME, curves, *EVALUATIONS])

    def _reached(self) -> tuple[progress.Progress | None, list[str]]:
        path, unknown = self.folder / progress.NAME, "what the interruption cost is not known"
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            place = path.rename(free_name(path.with_name(f"{path.name}-not-of-this-run")))
            return None, [f"{path} is no file of this run and was moved to {place}: {unknown}"]
        try:
            return progress.read(self.folder), []
        except ValueError as error:
            return None, [f"{error}: {unknown}"]

    def _restore_curves(
        self, checkpoint: Path, manifest: dict[str, Any], files: list[Path]
    ) -> list[str]:
        history = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))[
            "log_history"
        ]
        folder = self.folder / "tensorboard"
        lost = restore(folder, history, manifest["step"], manifest["saved"], files)
        return (
            [f"{folder} lacked {lost} values and was written anew from {checkpoint.name}"]
            if lost
            else []
        )

    def _write(
        self,
        old: dict | None,
        recipe: dict,
        launch: dict,
        now: dict[str, Any],
        entries: list[dict[str, Any]],
    ) -> None:
        old = old or {}
        record = {"status": "running", "reason": None, "started": old.get("started", now_utc())}
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

    def update(self, **facts: Any) -> None:
        """Add facts to run.json (rank 0)."""
        if self.is_main:
            write_json(self.path, read_run(self.folder) | facts)

    def finish(self, status: str, **facts: Any) -> None:
        """Write the final status (rank 0)."""
        assert status in STATUSES
        self.update(status=status, finished=now_utc(), **facts)

    def fail(self, reason: str, rank: int | None) -> None:
        """Record a failure of a rank (None: from outside). The first recorded one stays.

        A run that this process only looked at is not touched.
        """
        if self.path.is_file() and self.began is not False:
            record = read_run(self.folder)
            if record["status"] == "running":
                record |= {
                    "status": "failed",
                    "reason": reason,
                    "failed_rank": rank,
                    "finished": now_utc(),
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
