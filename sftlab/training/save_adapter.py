"""Saves what was trained into the run directory."""

import os
from pathlib import Path

from trl import SFTTrainer

from sftlab.files import sync, sync_tree
from sftlab.runs.clearing import TEMPORARY, remove_temporary
from sftlab.runs.made_files import free_name, walk
from sftlab.runs.run_directory import Run


def save_adapter(trainer: SFTTrainer, run: Run) -> None:
    """Save adapter, tokenizer and template; every rank calls it.

    They are written to a temporary folder, which then takes the place of the adapter's. Files of
    others in the adapter's folder stay.
    """
    temporary = run.folder / TEMPORARY
    if run.is_main:
        remove_temporary(run.folder)
        if temporary.exists():
            temporary.rename(free_name(run.folder / f"{TEMPORARY}-not-of-this-run"))
        run.made.note([f"{TEMPORARY}/"])
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(temporary))
    if run.is_main:
        (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
        sync_tree(temporary)
        _take_place(temporary, run)
        sync(run.folder)
    trainer.accelerator.wait_for_everyone()


def _take_place(temporary: Path, run: Run) -> None:
    """Move the new files to the adapter's folder; remove older ones that the run made there."""
    new = {path.relative_to(temporary) for path in walk(temporary)}
    there = list(walk(run.adapter)) if run.adapter.is_dir() else []
    old = [path for path in there if run.made.has(path)]
    for path in there:
        if path not in old and path.relative_to(run.adapter) in new:
            path.rename(free_name(path.with_name(f"{path.name}-not-of-this-run")))
    run.made.note_files(run.adapter / name for name in sorted(new))
    if os.path.lexists(run.adapter) and not run.adapter.is_dir():
        run.adapter.rename(free_name(run.folder / "adapter-not-of-this-run"))
    if not run.adapter.is_dir():
        temporary.rename(run.adapter)
    else:
        for name in sorted(new):
            (run.adapter / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).replace(run.adapter / name)
        for path in old:
            if path.relative_to(run.adapter) not in new:
                path.unlink()
        remove_temporary(run.folder)
    run.made.forget(f"{TEMPORARY}/")
