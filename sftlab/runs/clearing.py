"""Removes what an earlier run made, and nothing else."""

import shutil
from pathlib import Path

from sftlab.files import write_json
from sftlab.runs import progress
from sftlab.runs.checkpoint_manifest import remove_all
from sftlab.runs.made_files import MadeFiles, remove_empty
from sftlab.runs.record import RECORD, read_run

# the folder that an adapter is saved to before it takes its place
TEMPORARY = ".adapter"


def clear(folder: Path) -> None:
    """Remove exactly what the run in a folder made. run.json goes last.

    A kill within it leaves an interrupted run.
    """
    path, made = folder / RECORD, MadeFiles(folder)
    if path.is_file():
        replaced = {"status": "interrupted", "reason": "--overwrite was replacing it"}
        write_json(path, read_run(folder) | replaced)
    remove_all(folder)
    remove_temporary(folder)
    for file in [file for file in made.files() if file != path]:
        file.unlink()
        remove_empty(file.parent, folder)
    for name in (progress.NAME, RECORD):  # also of a run that kept no list
        (folder / name).unlink(missing_ok=True)
    made.path.unlink(missing_ok=True)


def remove_temporary(folder: Path) -> None:
    """Remove the temporary folder of an adapter whose saving was cut short."""
    if MadeFiles(folder).has_folder(TEMPORARY) and not (folder / TEMPORARY).is_symlink():
        shutil.rmtree(folder / TEMPORARY, ignore_errors=True)


def own_curves(folder: Path) -> list[Path]:
    """Returns the run's files of TensorBoard; all of them for a run that kept no list."""
    made = MadeFiles(folder)
    if not made.exists():
        return sorted((folder / "tensorboard").glob("events.out.tfevents.*"))
    return sorted(path for path in made.files() if path.parent.name == "tensorboard")
