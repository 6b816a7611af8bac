"""Checkpoints from which a run resumes exactly.

transformers saves weights, optimizer, schedule, loss scale and random states. It leaves out the
sums since the last log and what the run measures of itself. Those are the parts that are saved
beside its files. A checkpoint counts once its manifest is written.
"""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from sftlab.runs.checkpoint_manifest import foreign, in_order, remove, rotate, seal, step_of
from sftlab.runs.made_files import MadeFiles
from sftlab.training.disk_room import DiskRoom, NoRoom, is_full

# One file a rank: the state of every part.
PARTS_FILE = "resume_state-{}.json"
_log = logging.getLogger(__name__)


class Part(Protocol):
    """Something that counts over all starts of a run."""

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint must hold, as JSON."""

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""


class Checkpointer(TrainerCallback):
    """Saves and restores what transformers' checkpoints lack, and seals them with a manifest.

    `must_match` and `hardware` go into every manifest. `skipped` holds a sentence for every
    checkpoint that the disk had no room for.
    """

    def __init__(
        self, trainer: SFTTrainer, parts: dict[str, Part], seconds: Callable[[], float]
    ) -> None:
        self.must_match: dict[str, Any] = {}
        self.hardware: dict[str, Any] = {}
        self.skipped: list[str] = []
        self.saving_s = 0.0
        self.room = DiskRoom(trainer)
        self.folder = Path(trainer.args.output_dir)
        self.resume_from: str | None = None
        self._trainer, self._parts, self._seconds = trainer, parts, seconds

    def keep(self, name: str, part: Part) -> None:
        """Save one more part with every checkpoint, and restore it."""
        self._parts[name] = part

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Restore the parts; transformers has set its own sums to zero by now.

        Raises ValueError for a checkpoint of others whose name this training needs.
        """
        steps = range(state.global_step + 1, state.max_steps + 1)
        others = [
            path for path in foreign(self.folder) if path.name == f"checkpoint-{step_of(path)}"
        ]
        if taken := [path.name for path in others if step_of(path) in steps]:
            raise ValueError(
                f"{self.folder} has {', '.join(taken)}, which this run did not make and would have "
                "to write: move it, or pass another --output_dir"
            )
        if not self.resume_from:
            return
        path = Path(self.resume_from) / PARTS_FILE.format(args.process_index)
        if not path.is_file():  # a run of fewer processes saved it
            path = path.with_name(PARTS_FILE.format(0))
        states = json.loads(path.read_text(encoding="utf-8"))
        for name, part in self._parts.items():
            part.restore(states[name])

    def save(self, save_stock: Callable[[], None]) -> None:
        """Save a checkpoint with `save_stock` (transformers'), add the parts, then seal it.

        Every rank calls it. Without room on the disk the checkpoint is skipped and the training
        goes on. Raises NoRoom if the disk runs full while several ranks are saving, and NotFinite,
        before anything is written, for values that are not finite.
        """
        self._trainer.finiteness.look()
        self._trainer.finiteness.look_at_optimizer()
        started, args, best = time.perf_counter(), self._trainer.args, self._best()
        folder = self.folder / f"checkpoint-{self._trainer.state.global_step}"
        if why := self._ask_rank_0(lambda: self._prepare(folder, best)):
            return self._skip(why)
        # transformers would delete an old checkpoint before this one is sealed
        limit, args.save_total_limit = args.save_total_limit, None
        try:
            save_stock()
            self._save_parts(folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not is_full(error) and not self.room.is_short():
                raise
            remove(folder)
            why = self.room.describe()
            if args.world_size > 1:
                raise NoRoom(f"{why} ({error})") from error
            return self._skip(why)
        finally:
            args.save_total_limit = limit
        self._trainer.accelerator.wait_for_everyone()
        if args.process_index == 0:
            self._seal(folder)
            rotate(self.folder, limit, best)
        # a rank that left before the seal would make the launcher end rank 0
        self._trainer.accelerator.wait_for_everyone()
        self.saving_s += time.perf_counter() - started

    def _prepare(self, folder: Path, best: str | None) -> str | None:
        """Returns why there can be no checkpoint; None, once its folder is on the list."""
        if folder in foreign(self.folder):
            return f"{folder} was not made by this run"
        if why := self.room.make(best):
            return why
        self.folder.mkdir(parents=True, exist_ok=True)
        MadeFiles(self.folder).note([f"{folder.name}/"])
        return None

    def check_room(self) -> None:
        """Raise NoRoom if the disk cannot take one checkpoint.

        Every rank calls it, before the first step.
        """
        if why := self._ask_rank_0(lambda: self.room.make(None)):
            raise NoRoom(f"{why}; free some, or train with --output_dir on another disk")

    def refuse_full_disk(self, freed: Callable[[], int]) -> None:
        """Raise NoRoom if the disk cannot take one checkpoint once an earlier run is replaced.

        `freed` returns the bytes of that run. Nothing is removed. Every rank calls it.
        """
        room = self.room
        if why := self._ask_rank_0(lambda: room.describe() if room.is_short(freed()) else None):
            raise NoRoom(f"{why}; free some, or train with --output_dir on another disk")

    def facts(self) -> dict[str, Any]:
        """Returns number, size and saving time of the checkpoints, for run.json."""
        size = max(self.room.sizes, default=self.room.checkpoint_bytes())
        return {
            "saved": len(self.room.sizes),
            "mb": round(size / 2**20, 2),
            "saving_seconds": round(self.saving_s, 2),
            "skipped": self.skipped,
        }

    def _save_parts(self, folder: Path) -> None:
        states = {name: part.state() for name, part in self._parts.items()}
        path = folder / PARTS_FILE.format(self._trainer.args.process_index)
        path.write_text(json.dumps(states), encoding="utf-8")

    def _seal(self, folder: Path) -> None:
        args, state = self._trainer.args, self._trainer.state
        ranks = range(args.world_size)
        missing = [rank for rank in ranks if not (folder / PARTS_FILE.format(rank)).is_file()]
        if missing:
            raise RuntimeError(
                f"{folder} has no file of rank {', '.join(map(str, missing))}: output_dir must be "
                "on a file system that all nodes share"
            )
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
        best = args.load_best_model_at_end and state.best_model_checkpoint
        needs = [name] if best and (name := Path(best).name) != folder.name else []
        facts = {
            "step": state.global_step,
            "saved": time.time(),
            "train_seconds": round(self._seconds(), 3),
            "must_match": self.must_match,
            "hardware": self.hardware,
        }
        manifest = seal(folder, facts, needs)
        self.room.sizes.append(sum(size for size, _ in manifest["files"].values()))

    def _best(self) -> str | None:
        step = self._trainer.state.best_global_step
        return f"checkpoint-{step}" if step else None

    def _ask_rank_0(self, question: Callable[[], str | None]) -> str | None:
        answer = [question() if self._trainer.args.process_index == 0 else None]
        if self._trainer.args.world_size > 1:
            broadcast_object_list(answer)
        return answer[0]

    def _skip(self, why: str) -> None:
        step, last = self._trainer.state.global_step, in_order(self.folder)
        self.skipped.append(f"step {step}: {why}")
        if self._trainer.args.process_index == 0:
            kept = f"the last checkpoint is {last[-1].name}" if last else "there is none yet"
            _log.warning(
                "warning: no checkpoint at step %d: %s; the training goes on, %s", step, why, kept
            )
