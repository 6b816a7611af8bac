"""A folder that takes its name once it is complete."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sftlab.files import sync_tree


@contextmanager
def unfinished_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` that becomes it, or is removed where the body fails.

    Raises ValueError where `out` is there already or cannot be made.
    """
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} is there already: give another --out, or remove it first")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-unfinished-", dir=out.parent))
    except OSError as error:
        raise ValueError(f"{out} cannot be made: {error.strerror or error}") from error
    try:
        yield folder
        folder.chmod(0o755)
        sync_tree(folder)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
