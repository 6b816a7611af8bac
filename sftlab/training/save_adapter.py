"""Saves what was trained into the run directory."""

import shutil

from trl import SFTTrainer

from sftlab.files import sync, sync_tree
from sftlab.runs.run_directory import Run


def save_adapter(trainer: SFTTrainer, run: Run) -> None:
    """Save adapter, tokenizer and template; every rank calls it.

    They are written to a temporary folder, which then takes the place of the adapter's.
    """
    temporary = run.folder / ".adapter"
    if run.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(temporary))
    if run.is_main:
        (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
        sync_tree(temporary)
        shutil.rmtree(run.adapter, ignore_errors=True)
        temporary.rename(run.adapter)
        sync(run.folder)
    trainer.accelerator.wait_for_everyone()
