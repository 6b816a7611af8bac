"""Checkpoints on disk: which are valid, which one a run continues from, which ones are kept.

A checkpoint counts once it has a manifest, which is written last, after every process has written.
The manifest holds the size and SHA-256 of every file, what must be the same for the run to
continue, and its own hash. A folder that the run did not make is no checkpoint of it, whatever its
name: it is never moved, counted or removed.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from sftlab.files import file_hash, sync, write_json
from sftlab.runs.made_files import MadeFiles, free_name, remove_empty, walk
from sftlab.schema import COUNT, DURATION, NUMBER, OBJECT, TEXT, Kind, check, list_of

MANIFEST = "manifest.json"
FORMAT = 2
# names that invalid checkpoints are moved to; a number is added to one that is taken
BROKEN, UNFINISHED = "broken-{}", "unfinished-{}"
# names of the files that transformers, peft and this project save
_SAVED = re.compile(
    r"adapter_config\.json|adapter_model(-\d+-of-\d+)?\.(safetensors|bin)|README\.md|config\.json"
    r"|generation_config\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
    r"|optimizer(_\d+)?\.(pt|bin)|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth|trainer_state\.json"
    r"|training_args\.bin|tokenizer(_config)?\.(json|model)|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.(json|txt)|merges\.txt|spiece\.model|chat_template\.(jinja|json)"
    r"|processor_config\.json|resume_state-\d+\.json|manifest\.json"
    r"|pytorch_model_fsdp(_\d+)?\.bin|\.metadata|__\d+_\d+\.distcp|\..*\.part"
)
_FILES = Kind(
    "an object of names inside the folder, each with a size and a SHA-256",
    lambda value: (
        isinstance(value, dict)
        and all(
            not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
            for name in value
        )
        and all(
            isinstance(one, list) and len(one) == 2 and COUNT.holds(one[0]) and TEXT.holds(one[1])
            for one in value.values()
        )
    ),
)
_FOLDERS = Kind(
    "a list of checkpoint names",
    lambda value: (
        list_of(TEXT).holds(value) and all(re.fullmatch(r"checkpoint-\d+", name) for name in value)
    ),
)


class Found(NamedTuple):
    """The newest valid checkpoint of a run and its manifest, or None.

    `invalid` has the newer ones that do not count, each with the reason.
    """

    folder: Path | None
    manifest: dict[str, Any] | None
    invalid: list[tuple[Path, str]]


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
    MadeFiles(folder.parent).note([f"{folder.name}/"])
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
    """Find the newest valid checkpoint of a run. Changes nothing."""
    invalid: list[tuple[Path, str]] = []
    for folder in reversed(in_order(run)):
        try:
            manifest = verify(folder)
            _refuse_not_finite(folder)
            return Found(folder, manifest, invalid)
        except ValueError as error:
            invalid.append((folder, f"{error}"))
    return Found(None, None, invalid)


def set_aside(run: Path, invalid: Iterable[tuple[Path, str]]) -> list[str]:
    """Move checkpoints that do not count aside. Returns a sentence about each."""
    said = []
    for folder, why in invalid:
        sealed = (folder / MANIFEST).exists()
        place = free_name(run / (BROKEN if sealed else UNFINISHED).format(folder.name))
        MadeFiles(run).note([f"{place.name}/"])
        folder.rename(place)
        said.append(f"{why}: the checkpoint was moved to {place}")
    return said


def in_order(run: Path) -> list[Path]:
    """Returns the checkpoints that the run made, valid or not, oldest first."""
    return sorted((path for path in _named(run) if _is_own(path)), key=step_of)


def foreign(run: Path) -> list[Path]:
    """Returns what is named like a checkpoint and was not made by the run, oldest first."""
    return sorted((path for path in _named(run) if not _is_own(path)), key=step_of)


def _named(run: Path) -> list[Path]:
    return [path for path in run.glob("checkpoint-*") if re.fullmatch(r"[0-9]+", path.name[11:])]


def _is_own(folder: Path) -> bool:
    if folder.is_symlink() or not folder.is_dir():
        return False
    if MadeFiles(folder.parent).has_folder(folder.name):
        files = list(walk(folder))
        return not files or any(_is_saved(folder, path) for path in files)
    try:
        _read_manifest(folder)
    except ValueError:
        return False
    return True


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
    """Delete what was saved in a checkpoint; other files in its folder stay.

    The manifest goes first, so a kill leaves nothing that counts.
    """
    there = list(walk(folder))
    try:
        names = {folder / name for name in [*_read_manifest(folder)["files"], MANIFEST]}
        saved = [path for path in there if path in names]
    except ValueError:
        saved = [path for path in there if _is_saved(folder, path)]
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in saved:
        path.unlink(missing_ok=True)
        remove_empty(path.parent, folder.parent)
    remove_empty(folder, folder.parent)
    MadeFiles(folder.parent).forget(f"{folder.name}/")


def remove_all(run: Path) -> None:
    """Delete every checkpoint that the run made, also those set aside."""
    aside = [*run.glob(BROKEN.format("checkpoint-*")), *run.glob(UNFINISHED.format("checkpoint-*"))]
    listed = [path for path in aside if MadeFiles(run).has_folder(path.name)]
    for folder in [*in_order(run), *listed]:
        remove(folder)


def _is_saved(folder: Path, path: Path) -> bool:
    """Whether a file has a name that training saves, on the top or in a folder of FSDP's."""
    *folders, name = path.relative_to(folder).parts
    in_fsdp = re.fullmatch(r"(pytorch_model_fsdp|optimizer)_\d+", folders[0]) if folders else True
    return bool(len(folders) < 2 and in_fsdp and _SAVED.fullmatch(name))


def _refuse_not_finite(folder: Path) -> None:
    """Raise ValueError for weights that are NaN or infinite, which no training can continue."""
    from safetensors import SafetensorError, safe_open

    for path in [*folder.glob("adapter_model*.safetensors"), *folder.glob("model*.safetensors")]:
        where = f"{folder.name}/{path.name}"
        try:
            with safe_open(path, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118  (no dict)
                    tensor = weights.get_tensor(name)
                    if tensor.is_floating_point() and not tensor.isfinite().all():
                        raise ValueError(f"{where} has values that are not finite, in {name}")
        except SafetensorError as error:
            raise ValueError(f"{where} cannot be read ({error})") from error


def _synced_entry(path: Path) -> list[Any]:
    sync(path)
    return [path.stat().st_size, file_hash(path)]


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if path.exists() and not path.is_file():
        raise ValueError(f"{folder.name}/{MANIFEST} is no file")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        content, stated = manifest["content"], manifest["sha256"]
    except FileNotFoundError as error:
        raise ValueError(f"{folder.name} has no {MANIFEST}: its saving was cut short") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder.name}/{MANIFEST} cannot be read ({error})") from error
    if stated != _hash(content):
        raise ValueError(f"{folder.name}/{MANIFEST} is not what was saved (its SHA-256 is another)")
    where = f"{folder.name}/{MANIFEST}"
    if not isinstance(content, dict):
        raise ValueError(f"{where}: content is {content!r}, expected an object")
    if content.get("format") != FORMAT:
        raise ValueError(f"{where} has format {content.get('format')}, this version reads {FORMAT}")
    required = {
        "step": COUNT,
        "saved": NUMBER,
        "train_seconds": DURATION,
        "must_match": OBJECT,
        "hardware": OBJECT,
        "needs": _FOLDERS,
        "files": _FILES,
    }
    check(content, where, required)
    if content["step"] != step_of(folder) and folder.name.startswith("checkpoint-"):
        raise ValueError(f"{where}: step is {content['step']}, expected {step_of(folder)}")
    return content


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
