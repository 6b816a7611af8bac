"""A folder that takes its name once it is complete.

A lock on the folder (flock) says that its process still writes it. The kernel frees it when the
process ends, however it ends, so what a killed process left is known by having no lock. Some file
systems keep such locks on one host alone, so the folder's name has the host.
"""

import fcntl
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sftlab.files import sync_tree


@contextmanager
def unfinished_folder(out: Path, say: Callable[[str], object]) -> Iterator[Path]:
    """Yield a folder beside `out` that becomes it, or is removed where the body fails.

    What killed processes left of the same name is removed first, which `say` is told. Raises
    ValueError where `out` is there already or cannot be made.
    """
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} is there already: give another --out, or remove it first")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out, say)
        folder, lock = _made(out)
    except OSError as error:
        raise ValueError(f"{out} cannot be made: {error.strerror or error}") from error
    try:
        yield folder
        folder.chmod(0o755)
        sync_tree(folder)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _made(out: Path) -> tuple[Path, int]:
    """Returns a new folder beside `out`, and the descriptor that holds its lock."""
    while True:
        prefix = f".{out.name}-unfinished-{socket.gethostname()}-"
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
        with suppress(FileNotFoundError):  # another process took it for a leftover meanwhile
            lock = os.open(folder, os.O_RDONLY)
            with suppress(OSError):  # a file system without such locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.is_dir():
                return folder, lock
            os.close(lock)


def _remove_leftovers(out: Path, say: Callable[[str], object]) -> None:
    """Remove unfinished folders of `out` whose process is gone. Say where others may be left."""
    name = re.compile(rf"\.{re.escape(out.name)}-unfinished-(.+)-[a-z0-9_]{{8}}")
    for left in sorted(out.parent.iterdir()):
        made = name.fullmatch(left.name)
        if made is None or left.is_symlink() or not left.is_dir():
            continue
        host = made[1]
        removed = _removed(left) if host == socket.gethostname() else None
        if removed:
            say(f"removed {left}, which a process that is gone left unfinished")
        elif removed is None:
            say(f"{left} is unfinished: remove it if nothing on {host} writes it")


def _removed(folder: Path) -> bool | None:
    """Remove a folder that no process has the lock of.

    Returns False where one has it, and None where that cannot be told.
    """
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # the lock is held meanwhile: its maker may wait for it, and then sees that it is gone
        shutil.rmtree(folder)
    except BlockingIOError:
        return False
    except OSError:
        return None
    finally:
        os.close(lock)
    return True
