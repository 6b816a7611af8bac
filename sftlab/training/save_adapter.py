"""Saves what was trained into the run directory."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from sftlab.files import sync, sync_tree
from sftlab.models.plain_adapter import make_plain
from sftlab.runs.checkpoint_manifest import in_order
from sftlab.runs.clearing import TEMPORARY, remove_temporary
from sftlab.runs.made_files import free_name, walk
from sftlab.runs.run_directory import Run
from sftlab.training.trainer import LabTrainer


class AfterTraining(RuntimeError):
    """What follows the last step failed; the message says what, and its cause why."""


@contextmanager
def after_training(trainer: LabTrainer, what: str) -> Iterator[None]:
    """Raise AfterTraining for a failure inside, once what was trained is kept in a checkpoint.

    A run of several processes has the checkpoints that its recipe asks for.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        step, alone = trainer.state.global_step, trainer.args.world_size == 1
        folder = Path(trainer.args.output_dir)
        saved = [path.name for path in in_order(folder)]
        adapter = folder / "adapter" / "adapter_model.safetensors"
        if alone and f"checkpoint-{step}" not in saved and not adapter.is_file():
            with suppress(OSError, RuntimeError, ValueError, SafetensorError):
                trainer._save_checkpoint(trainer.model, None)
        raise AfterTraining(f"{what} failed after the last step") from error


def save_adapter(trainer: LabTrainer, run: Run) -> None:
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
        if trainer.initial_matrices:
            make_plain(temporary, trainer.initial_matrices)
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
