"""The list of what a run made, `made.txt` in its directory: nothing else is ever removed from it.

A line names a file, or several by a pattern (*, ?, [...]); a line that ends with a slash names a
folder that the run made, whose files have other lines or a manifest. A name is in the list before
it is on the disk, so a kill leaves nothing that is not listed.
"""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from sftlab.files import write_text

LIST = "made.txt"
_HEADING = "# What this run made. --overwrite removes exactly these; everything else stays."
_HASH = "[0-9a-f]" * 8
# what eval/ writes: its names are fixed, or end in a hash
_EVALUATIONS = (
    *("quality.json", "quality.jsonl", "quality-*.json", "quality-*.jsonl"),
    "of-*-rows-quality*.json*",  # results of more rows than the newest one's
    *("preferences.json", "preferences.jsonl", "preferences-*.json", "preferences-*.jsonl"),
    *("start_rows.jsonl", "start_rows-*.jsonl"),
    *("alpaca.json", "mt_bench.json", "harness.json", "annotations-*.json"),
    *(f"{kind}-{_HASH}{_HASH[:32]}.jsonl" for kind in ("answers", "verdicts")),
    *(f"{kind}-*-{_HASH}.*" for kind in ("alpaca", "mt_bench")),
    *("harness/*-*shot*.jsonl", "harness/.unfinished-*.db*"),
)
EVALUATIONS = tuple(f"eval/{name}" for name in _EVALUATIONS)


class MadeFiles:
    """The list in a run directory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / LIST

    def exists(self) -> bool:
        """Returns whether there is a list, which only this program writes."""
        return self.path.is_file() and not self.path.is_symlink()

    def lines(self) -> list[str]:
        """Returns the names. Raises ValueError for a file that is no such list."""
        if not self.exists():
            if os.path.lexists(self.path):
                raise ValueError(f"{self.path} is no file that a run made: move it away")
            return []
        try:
            heading, *names = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path} cannot be read ({error})") from error
        if heading != _HEADING:
            raise ValueError(
                f"{self.path} is not the list of what a run made: its first line is "
                f"{heading[:60]!r}, expected {_HEADING!r}"
            )
        return [name for name in names if name and _stays_inside(name)]

    def note(self, names: Iterable[str]) -> None:
        """Add names, as files of any name or as patterns, before they are made."""
        have = self.lines()
        if new := [name for name in dict.fromkeys(names) if name not in have]:
            write_text(self.path, "\n".join([_HEADING, *have, *new]) + "\n")

    def note_files(self, paths: Iterable[Path]) -> None:
        """Add files whose names are meant literally."""
        self.note(glob.escape(path.relative_to(self.folder).as_posix()) for path in paths)

    def forget(self, name: str) -> None:
        """Take a name off the list."""
        have = self.lines()
        if name in have:
            write_text(self.path, "\n".join([_HEADING, *(x for x in have if x != name)]) + "\n")

    def has_folder(self, name: str) -> bool:
        """Returns whether the run made the folder of this name."""
        return f"{name}/" in self.lines()

    def files(self) -> Iterator[Path]:
        """Yield the listed files that exist. Nothing behind a link to a folder is one."""
        patterns = [name for name in self.lines() if not name.endswith("/")]
        for path in walk(self.folder):
            name = path.relative_to(self.folder).as_posix()
            if any(_matches(name, pattern) for pattern in patterns):
                yield path

    def has(self, path: Path) -> bool:
        """Returns whether the run made a file."""
        name = path.relative_to(self.folder).as_posix()
        return any(_matches(name, pattern) for pattern in self.lines())

    def remove(self) -> None:
        """Remove the listed files, and the folders that this leaves empty."""
        for path in list(self.files()):
            path.unlink()
            remove_empty(path.parent, self.folder)


def walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, links included, without following any link."""
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        yield from (Path(root, name) for name in [*files, *links])


def remove_empty(folder: Path, top: Path) -> None:
    """Remove a folder and those above it, up to `top`, while they are empty."""
    while folder != top and not folder.is_symlink():
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent


def free_name(path: Path) -> Path:
    """Returns `path`, or the first of path-2, path-3 ... that does not exist."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = PurePosixPath(name).parts, PurePosixPath(pattern).parts
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def result_name(name: str, dataset: str | None) -> str:
    """Returns the name of what is written of an evaluation, without an ending.

    That is `name`, and behind it another data set's own.
    """
    other = dataset and re.sub(r"\W+", "-", Path(dataset).stem)
    return f"{name}-{other}" if other else name
