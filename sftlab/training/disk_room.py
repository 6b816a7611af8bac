"""Does the disk have room for a checkpoint?"""

import errno
import shutil
from pathlib import Path

from peft import PeftModel
from trl import SFTTrainer

from sftlab.runs.checkpoint_manifest import rotate

# Model card, adapter config, schedule, random states of some ranks.
SMALL_FILES = 1 << 20


class NoRoom(OSError):
    """The disk is full; the message says how much is needed."""


def is_full(error: BaseException) -> bool:
    """Returns whether an error says that a disk, or the user's quota on it, is full."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, NoRoom) or full or "No space left on device" in str(error)


def estimate_checkpoint_bytes(trainer: SFTTrainer) -> int:
    """Returns an upper bound of a checkpoint's size, for optimizers with two states per weight."""
    model = trainer.model
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    weights = trained if isinstance(model, PeftModel) else whole
    # FSDP writes a file of its own with the weights, beside the adapter's
    weights *= 2 if trainer.is_fsdp_enabled else 1
    backend = getattr(trainer.processing_class, "backend_tokenizer", None)
    tokenizer = len(backend.to_str(pretty=True)) if backend else 0
    return weights + 2 * trained + SMALL_FILES + tokenizer


class DiskRoom:
    """The room that a run's disk has for checkpoints.

    `sizes` holds the bytes of every checkpoint saved by this start.
    """

    def __init__(self, trainer: SFTTrainer) -> None:
        self.sizes: list[int] = []
        self._trainer, self._folder = trainer, Path(trainer.args.output_dir)

    def checkpoint_bytes(self) -> int:
        """Returns the size of the last checkpoint, or an estimate before the first one."""
        return self.sizes[-1] if self.sizes else estimate_checkpoint_bytes(self._trainer)

    def is_short(self, freed: int = 0) -> bool:
        """Returns whether the disk cannot take one more checkpoint, once `freed` bytes are free."""
        return self._free() + freed < self.checkpoint_bytes()

    def make(self, best: str | None) -> str | None:
        """Delete old checkpoints if one more does not fit and `save_total_limit` allows it.

        `best` names a checkpoint to keep. Returns why there is still no room; None if there is.
        """
        limit = self._trainer.args.save_total_limit
        if limit and self.is_short():
            rotate(self._folder, max(1, limit - 1), best)
        return self.describe() if self.is_short() else None

    def describe(self) -> str:
        """Returns what a checkpoint needs and what the disk has left, in words."""
        needed, limit = self.checkpoint_bytes(), self._trainer.args.save_total_limit
        kept = f", {limit + 1} of them fit in {_mb((limit + 1) * needed)}" if limit else ""
        return (
            f"a checkpoint needs {_mb(needed)} and {self._folder} has {_mb(self._free())} "
            f"left{kept}"
        )

    def _free(self) -> int:
        return shutil.disk_usage(self._folder).free


def _mb(size: int) -> str:
    return f"{size / 2**20:,.1f} MB"
