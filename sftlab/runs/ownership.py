"""Whose is a folder? Only a run's own, or an empty one, is ever written into."""

import os
import re
from pathlib import Path
from typing import Any

from sftlab.runs import progress
from sftlab.runs.checkpoint_manifest import in_order
from sftlab.runs.made_files import LIST, MadeFiles
from sftlab.runs.record import RECORD, read_run
from sftlab.runs.run_lock import LOCK

# what recipes/study.py writes into a task's folder before the training begins
_LAUNCHERS = ("task.json", "log")
_SHOWN = 5
# files that a kill left while they were written: see sftlab/files.py
PARTS = re.compile(r"\.(run\.json|made\.txt)\..+\.\d+\.part")


def existing_record(folder: Path) -> dict[str, Any] | None:
    """Returns run.json of a run's folder; None where the folder is new, or the file is gone.

    Raises ValueError for a folder that is not a run's, and for a run.json that is damaged.
    """
    if str(folder).startswith("~"):
        raise ValueError(
            f"--output_dir {folder} begins with ~, which a shell replaces and a recipe does not: "
            "write the whole path"
        )
    try:
        os.stat(folder)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name that is too long, a link to itself
        raise ValueError(f"--output_dir {folder} cannot be made: {error.strerror}") from error
    if os.path.lexists(folder) and not folder.is_dir():
        what = "a link to nothing" if folder.is_symlink() else "no folder"
        raise ValueError(
            f"--output_dir {folder} is {what}: name a folder, or one that is not there"
        )
    made = MadeFiles(folder)
    if os.path.lexists(folder / RECORD):
        try:
            record = read_run(folder)
            made.lines()
        except ValueError as error:
            raise ValueError(f"{error}. {_untouched(folder)}") from error
        _refuse_no_folders(folder)
        return record
    _refuse_no_folders(folder)
    if made.exists():
        made.lines()
    elif not in_order(folder):
        _refuse_foreign(folder)
    return None


def _refuse_no_folders(folder: Path) -> None:
    for name in ("adapter", "tensorboard"):
        if os.path.lexists(folder / name) and not (folder / name).is_dir():
            raise ValueError(f"{folder / name} is no folder, and the run needs one: move it away")


def _untouched(folder: Path) -> str:
    kept = in_order(folder)
    then = (
        f"move run.json out of it, and the same command continues from {kept[-1].name}"
        if kept
        else "repair the file, or train with another --output_dir"
    )
    return f"Nothing in {folder} was changed: {then}"


def _refuse_foreign(folder: Path) -> None:
    """Raise ValueError for a folder with files that are not a run's."""
    own = (*_LAUNCHERS, LOCK)
    found = sorted(
        path for path in folder.glob("*") if path.name not in own and not PARTS.fullmatch(path.name)
    )
    if found:
        names = [f"{path.name}/" if path.is_dir() else path.name for path in found]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise ValueError(
            f"{folder} is not a run's folder: it has no run.json, but {', '.join(names[:_SHOWN])}"
            f"{more}. Nothing was changed: pass another --output_dir, or empty this one"
        )


def refuse_unlisted(folder: Path) -> None:
    """Raise ValueError for a run without a list of what it made, which nothing may replace."""
    if MadeFiles(folder).exists() or not folder.is_dir():
        return
    own = (*_LAUNCHERS, LOCK, RECORD, progress.NAME)
    found = sorted(path.name for path in folder.glob("*") if path.name not in own)
    if found:
        raise ValueError(
            f"{folder} has no {LIST}, the list of what its run made, so --overwrite cannot tell "
            f"its files ({', '.join(found[:_SHOWN])}) from others: pass another --output_dir, or "
            "move this one"
        )
