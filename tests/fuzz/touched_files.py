"""What a script did to the files that were there before it ran."""

import hashlib
import os
import shutil
import stat
from pathlib import Path

from world import FOREIGN

# what a script may change in a folder that is there already
OWNS = {
    "sft": ("run/", "stopped/", "out/"),
    "quality": ("run/eval/",),
    "preferences": ("preferred/eval/",),
    "alpaca": ("run/eval/",),
    "mt_bench": ("run/eval/",),
    "tokenize": ("tokens/",),
    "app": ("votes.jsonl",),
}
# every content of these must still be somewhere after a refusal
KEPT = (
    "run/adapter/",
    "run/eval/",
    "preferred/adapter/",
    "preferred/eval/",
    "run/checkpoint-",
    "stopped/checkpoint-",
)


def seen(folder: Path) -> dict[str, tuple]:
    """Returns what every path under a folder is; a changed file has other values."""
    found = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        whole = stat.S_ISREG(info.st_mode)
        facts = (info.st_ino, info.st_size, info.st_mtime_ns) if whole else ()
        target = os.readlink(path) if path.is_symlink() else ""
        found[path.relative_to(folder).as_posix()] = (stat.S_IFMT(info.st_mode), target, *facts)
    return found


def damage(script: str, code: int | None, folder: Path, before: dict, hashes: dict) -> list[str]:
    """Returns what a script did to files that are not its own.

    `before` is `seen(folder)` before it ran, and `hashes` the content of each file in KEPT.
    """
    after, own = seen(folder), OWNS.get(script, ())
    found = []
    for path, was in before.items():
        inside = path.removeprefix("work/")
        foreign = inside in FOREIGN or path.startswith("beside/")
        if after.get(path) != was and (foreign or not inside.startswith(own)):
            found.append(f"{'altered' if path in after else 'removed'} {path}")
    new = set(after) - set(before)
    found += [f"wrote {path}" for path in sorted(new) if path.startswith("beside/")]
    if code in (1, 2) and script == "sft":
        left = {digest(folder / path) for path, what in after.items() if what[0] == stat.S_IFREG}
        found += [f"lost {path}" for path, content in hashes.items() if content not in left]
    return found


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def clean(folder: Path) -> None:
    """Remove a case's folder, which may hold links and files without rights."""
    shutil.rmtree(folder, ignore_errors=True)
