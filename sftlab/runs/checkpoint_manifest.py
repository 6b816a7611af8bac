"""Checkpoints on disk: which are valid, which one a run continues from, which ones are kept.

A checkpoint counts once it has a manifest, which is written last, after every process has written.
The manifest holds the size and SHA-256 of every file, what must be the same for the run to
continue, and its own hash.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from sftlab.files import file_hash, sync, write_json

MANIFEST = "manifest.json"
FORMAT = 2
# names that invalid checkpoints are moved to; of the unfinished ones only the last is kept
BROKEN, UNFINISHED = "broken-{}", "unfinished-checkpoint"


class Found(NamedTuple):
    """The newest valid checkpoint of a run and its manifest, or None.

    `set_aside` has one sentence about each checkpoint that was moved aside.
    """

    folder: Path | None
    manifest: dict[str, Any] | None
    set_aside: list[str]


def seal(folder: Path, facts: Mapping[str, Any], needs: Iterable[str] = ()) -> dict[str, Any]:
    """Write the manifest of a checkpoint whose files are complete. From now on it counts.

    `needs` names other checkpoints of the run that this one depends on. Returns the manifest's
    content. Hashing and syncing take about a second per gigabyte.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    with ThreadPoolExecutor(4) as pool:
        entries = pool.map(_synced_entry, paths)
        files = {
            path.relative_to(folder).as_posix(): entry
            for path, entry in zip(paths, entries, strict=True)
        }
    content = {"format": FORMAT, **facts, "needs": list(needs), "files": files}
    content = json.loads(json.dumps(content, default=str))
    for written in {path.parent for path in paths}:
        sync(written)
    write_json(folder / MANIFEST, {"sha256": _hash(content), "content": content})
    sync(folder)
    sync(folder.parent)
    return content


def verify(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a valid checkpoint. Raises ValueError with the file at fault."""
    content = _read_manifest(folder)
    for name, (size, expected) in content["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder.name}/{name} is missing")
        if (found := path.stat().st_size) != size:
            raise ValueError(
                f"{folder.name}/{name} has {found:,} bytes and was saved with {size:,}"
            )
        if file_hash(path) != expected:
            raise ValueError(f"{folder.name}/{name} is not what was saved (its SHA-256 is another)")
    for needed in content["needs"]:
        try:
            verify(folder.parent / needed)
        except ValueError as error:
            raise ValueError(
                f"{folder.name} needs {needed}, the best model so far, but {error}"
            ) from error
    return content


def newest_valid(run: Path) -> Found:
    """Find the newest valid checkpoint of a run, and move every newer one aside."""
    aside: list[str] = []
    for folder in reversed(in_order(run)):
        try:
            return Found(folder, verify(folder), aside)
        except ValueError as error:
            sealed = (folder / MANIFEST).exists()
            place = run / (BROKEN.format(folder.name) if sealed else UNFINISHED)
            shutil.rmtree(place, ignore_errors=True)
            folder.rename(place)
            aside.append(f"{error}: the checkpoint was moved to {place}")
    return Found(None, None, aside)


def in_order(run: Path) -> list[Path]:
    """Returns the checkpoints of a run, valid or not, oldest first."""
    found = [
        path for path in run.glob("checkpoint-*") if path.name[11:].isdigit() and path.is_dir()
    ]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """Returns the optimizer steps done when a checkpoint was saved."""
    return int(folder.name.rpartition("-")[2])


def rotate(run: Path, keep: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `keep` (None or 0: delete none).

    The newest and the one named `best` stay. Call it once the newest is sealed.
    """
    folders = in_order(run)
    spare = [folder for folder in folders[:-1] if folder.name != best]
    for folder in spare[: max(0, len(folders) - keep) if keep else 0]:
        remove(folder)


def remove(folder: Path) -> None:
    """Delete a checkpoint. The manifest goes first, so a kill leaves nothing that counts."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def remove_all(run: Path) -> None:
    """Delete every checkpoint of a run, also those set aside."""
    for folder in [*run.glob("checkpoint-*"), *run.glob(BROKEN.format("*")), run / UNFINISHED]:
        remove(folder)


def _synced_entry(path: Path) -> list[Any]:
    sync(path)
    return [path.stat().st_size, file_hash(path)]


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        content, stated = manifest["content"], manifest["sha256"]
    except FileNotFoundError as error:
        raise ValueError(f"{folder.name} has no {MANIFEST}: its saving was cut short") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder.name}/{MANIFEST} cannot be read ({error})") from error
    if stated != _hash(content):
        raise ValueError(f"{folder.name}/{MANIFEST} is not what was saved (its SHA-256 is another)")
    if content["format"] != FORMAT:
        raise ValueError(
            f"{folder.name}/{MANIFEST} has format {content['format']}, this version reads {FORMAT}"
        )
    return content


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
