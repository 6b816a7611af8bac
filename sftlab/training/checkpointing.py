"""A training that continues exactly: what transformers' checkpoint lacks, when it counts, and a
disk without room.

transformers saves weights, optimizer, schedule, loss scale and random states. It does not save what
has added up since the last log (the loss, trl's metrics), nor what the run measures of itself; a
continued run would log other figures.
"""

import errno
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sftlab.measurement.memory import peak_of_process
from sftlab.runs.checkpoint_manifest import in_order, remove, rotate, seal
from sftlab.runs.progress import Notes

if TYPE_CHECKING:
    from sftlab.training.trainer import LabTrainer

# Model card, adapter config, schedule, random states of some ranks.
SMALL_FILES = 1 << 20
_ADDED_UP = "added_up-{}.json"
_log = logging.getLogger(__name__)


class NoRoom(OSError):
    """The disk is full; says how much is needed."""


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or what one may use of it, is full."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, NoRoom) or full or "No space left on device" in str(error)


@contextmanager
def dtypes_kept(model: nn.Module) -> Iterator[None]:
    """Loading inside leaves every parameter its dtype.

    Peft makes bfloat16 LoRA matrices, as QLoRA's, float32.
    """
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype != before[name]:
            parameter.data = parameter.data.to(before[name])


class Resume(TrainerCallback):
    """The saving and the continuing of one trainer.

    `must_match` and `hardware` go into every manifest.

    `skipped` holds a sentence for every checkpoint that the disk had no room for, `earlier` what
    the starts before this one measured (their peak memory, the dtype they computed in).
    """

    def __init__(self, trainer: "LabTrainer") -> None:
        self.must_match: dict[str, Any] = {}
        self.hardware: dict[str, Any] = {}
        self.skipped: list[str] = []
        self.sizes: list[int] = []
        self.saving_s = 0.0
        self.earlier: dict[str, Any] = {"peak": {}, "observed": {}}
        self._trainer, self._from = trainer, None
        self._kept_s, self._began = 0.0, time.perf_counter()
        self._put_off = False
        self._notes: Notes | None = None

    @property
    def seconds(self) -> float:
        """Seconds of training over all starts, without what was thrown away or spent waiting for
        another training.
        """
        return self._kept_s + time.perf_counter() - self._began - self._trainer.meter.waited_s

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self._trainer.args.output_dir)

    def begin(self, checkpoint: str | None, max_steps: int, epochs: int) -> tuple[int, int] | None:
        """The training begins, or goes on from a checkpoint; the clock starts.

        Returns the epochs and, of the next one, the micro-batches that are done, where transformers
        takes them wrongly.
        """
        self._from, self._began = checkpoint and Path(checkpoint), time.perf_counter()
        best = self._best()
        if checkpoint and best and (self.folder / best).is_dir():
            self._trainer.state.best_model_checkpoint = str(
                self.folder / best
            )  # it may have been moved
        state, args = self._trainer.state, self._trainer.args
        args.eval_on_start = args.eval_on_start and not checkpoint
        if state.global_step >= max_steps:
            return epochs, 0  # transformers would take a step more
        if checkpoint and isinstance(self._trainer.train_dataset, IterableDataset):
            # transformers takes a stream for one epoch, however often it has begun again
            passes, share = divmod(state.epoch, 1)
            return int(passes), round(share * max_steps * args.gradient_accumulation_steps)
        return None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """transformers has set its sums to nought by now."""
        if self._from:
            mine = self._from / _ADDED_UP.format(args.process_index)
            first = self._from / _ADDED_UP.format(0)  # of a rank that there was not
            self._restore(
                json.loads((mine if mine.is_file() else first).read_text(encoding="utf-8"))
            )
        if args.process_index == 0:
            self._notes = Notes(self.folder)
            self._notes.write(state.global_step, self._kept_s)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Note how far it is. At the end of an epoch that is evaluated or logged, a checkpoint
        comes after that.
        """
        if self._notes:
            self._notes.write(state.global_step, self.seconds)
        by_epoch = "epoch" in (args.eval_strategy, args.logging_strategy)
        if control.should_save and by_epoch and state.epoch == int(state.epoch):
            control.should_save, self._put_off = False, True

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Save what was put off: a run that goes on from there begins the next epoch."""
        control.should_save, self._put_off = control.should_save or self._put_off, False

    def save(self, stock: Callable[[], None]) -> None:
        """Save a checkpoint by `stock`, add what it lacks, seal it once every rank has written.

        Every rank calls it.

        Where the disk has no room the training goes on without. Raises NoRoom where it ran full in
        the middle of it and several ranks wait for one another.
        """
        began, args = time.perf_counter(), self._trainer.args
        folder = self.folder / f"checkpoint-{self._trainer.state.global_step}"
        best = self._best()
        if why := self._agreed(lambda: self._no_room(best)):
            return self._skip(why)
        limit, args.save_total_limit = (
            args.save_total_limit,
            None,
        )  # until this one counts none goes
        try:
            stock()
            mine = folder / _ADDED_UP.format(args.process_index)
            mine.write_text(json.dumps(self._added_up()), encoding="utf-8")
        except (OSError, RuntimeError, SafetensorError) as error:
            if not is_full(error) and shutil.disk_usage(self.folder).free >= self.planned_bytes():
                raise
            remove(folder)
            why = self._says(shutil.disk_usage(self.folder).free)
            if args.world_size > 1:
                raise NoRoom(f"{why} ({error})") from error
            return self._skip(why)
        finally:
            args.save_total_limit = limit
        self._trainer.accelerator.wait_for_everyone()
        if args.process_index == 0:
            self._seal(folder)
            rotate(self.folder, limit, best)
        # nobody leaves before it counts: the launcher would end the others
        self._trainer.accelerator.wait_for_everyone()
        self.saving_s += time.perf_counter() - began

    def check_room(self) -> None:
        """Raise NoRoom where the disk cannot take one checkpoint.

        Every rank calls it, before the first step.
        """
        if why := self._agreed(lambda: self._no_room(None)):
            raise NoRoom(f"{why}; free some, or train with --output_dir on another disk")

    def planned_bytes(self) -> int:
        """Size of a checkpoint: the last one's.

        Before the first a bound for optimizers of two states a weight.
        """
        if self.sizes:
            return self.sizes[-1]
        model = self._trainer.model
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        whole = sum(p.numel() * p.element_size() for p in model.parameters())
        weights = trained if isinstance(model, PeftModel) else whole
        # FSDP's own file of the weights comes beside the adapter's
        weights *= 2 if self._trainer.is_fsdp_enabled else 1
        backend = getattr(self._trainer.processing_class, "backend_tokenizer", None)
        return (
            weights
            + 2 * trained
            + SMALL_FILES
            + (len(backend.to_str(pretty=True)) if backend else 0)
        )

    def facts(self) -> dict[str, Any]:
        """For run.json: what saving took and how large a checkpoint is."""
        size = round(max(self.sizes, default=self.planned_bytes()) / 2**20, 2)
        return {
            "saved": len(self.sizes),
            "mb": size,
            "saving_seconds": round(self.saving_s, 2),
            "skipped": self.skipped,
        }

    def _seal(self, folder: Path) -> None:
        args, state = self._trainer.args, self._trainer.state
        missing = [
            r for r in range(args.world_size) if not (folder / _ADDED_UP.format(r)).is_file()
        ]
        if missing:
            raise RuntimeError(
                f"{folder} holds nothing of rank {', '.join(map(str, missing))}: output_dir must "
                "be on a file system "
                f"that all nodes share"
            )
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
        needed = args.load_best_model_at_end and state.best_model_checkpoint
        needs = [name] if needed and (name := Path(needed).name) != folder.name else []
        facts = {
            "step": state.global_step,
            "saved": time.time(),
            "train_seconds": round(self.seconds, 3),
        }
        manifest = seal(
            folder, facts | {"must_match": self.must_match, "hardware": self.hardware}, needs
        )
        self.sizes.append(sum(size for size, _ in manifest["files"].values()))

    def _best(self) -> str | None:
        step = self._trainer.state.best_global_step
        return f"checkpoint-{step}" if step else None

    def _agreed(self, question: Callable[[], str | None]) -> str | None:
        answer = [question() if self._trainer.args.process_index == 0 else None]
        if self._trainer.args.world_size > 1:
            broadcast_object_list(answer)
        return answer[0]

    def _no_room(self, best: str | None) -> str | None:
        needed, limit = self.planned_bytes(), self._trainer.args.save_total_limit
        if shutil.disk_usage(self.folder).free < needed and limit:
            rotate(self.folder, max(1, limit - 1), best)
        free = shutil.disk_usage(self.folder).free
        return self._says(free) if free < needed else None

    def _says(self, free: int) -> str:
        needed, limit = self.planned_bytes(), self._trainer.args.save_total_limit
        kept = f", {limit + 1} of them fit in {_mb((limit + 1) * needed)}" if limit else ""
        return f"a checkpoint needs {_mb(needed)} and {self.folder} has {_mb(free)} left{kept}"

    def _skip(self, why: str) -> None:
        step, last = self._trainer.state.global_step, in_order(self.folder)
        stays = (
            f"the last checkpoint stays {last[-1].name}" if last else "there is no checkpoint yet"
        )
        self.skipped.append(f"step {step}: {why}")
        if self._trainer.args.process_index == 0:
            _log.warning(
                "warning: no checkpoint at step %d: %s; the training goes on, %s", step, why, stays
            )

    def _added_up(self) -> dict[str, Any]:
        trainer = self._trainer
        return {
            "loss": trainer._tr_loss.item(),
            "total_loss": trainer._total_loss_scalar,
            "last_logged": trainer._globalstep_last_logged,
            "metrics": trainer._metrics["train"],
            "sums": None if trainer._sums is None else trainer._sums.tolist(),
            "tokens": [trainer._real_tokens, trainer._total_train_tokens],
            "meter": trainer.meter.state(),
            "observed": trainer.observed,
            "peak": peak_of_process(trainer.memory, self.earlier["peak"]),
            "train_seconds": self.seconds,
        }

    def _restore(self, added_up: dict[str, Any]) -> None:
        trainer = self._trainer
        trainer._tr_loss = torch.tensor(added_up["loss"], device=trainer.args.device)
        trainer._total_loss_scalar = added_up["total_loss"]
        trainer._globalstep_last_logged = added_up["last_logged"]
        trainer._metrics["train"].update(added_up["metrics"])
        sums = added_up["sums"]
        trainer._sums = None if sums is None else torch.tensor(sums, device=trainer.args.device)
        trainer._real_tokens, trainer._total_train_tokens = added_up["tokens"]
        trainer.meter.restore(added_up["meter"])
        self.earlier, self._kept_s = added_up, added_up["train_seconds"]


def _mb(size: int) -> str:
    return f"{size / 2**20:,.1f} MB"
