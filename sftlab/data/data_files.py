"""Which local files does a data set's name mean, and of what kind are they?

A name is a file, a folder, a pattern such as data/*.jsonl, or several files.
"""

import glob
import gzip
import importlib.util
import io
import re
from pathlib import Path
from typing import IO

from huggingface_hub import HfFileSystem

# how the address of a file on the hub begins
HUB = "hf://"

# how files are read; .gz or .zst may follow those of text
KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".md": "text",
}
_COMPRESSED = (".gz", ".zst")
TEXT_KINDS = ("json", "csv", "text")


def file_kind(path: str | Path) -> str | None:
    """Returns json, csv, text, parquet or arrow; None for a file of another type."""
    path = Path(path)
    kind = KINDS.get(data_suffix(path))
    return kind if kind in TEXT_KINDS or path.suffix not in _COMPRESSED else None


def data_suffix(path: Path) -> str:
    """Returns the suffix that says what is in a file, without that of its compression."""
    return path.with_suffix("").suffix if path.suffix in _COMPRESSED else path.suffix


def known_types() -> str:
    """Returns the suffixes that can be read, for a message."""
    return f"{', '.join(KINDS)} (text also as {' or '.join(_COMPRESSED)})"


def open_text(path: str | Path, newline: str | None = None) -> IO[str]:
    """Open a file of UTF-8 text, compressed or not, on this machine or on the hub (hf://...).

    Raises ValueError for a .zst file where the package that reads it is missing.
    """
    name, how = str(path), {"encoding": "utf-8-sig", "newline": newline}
    source = HfFileSystem().open(name, "rb") if name.startswith(HUB) else name
    if name.endswith(".gz"):
        return gzip.open(source, "rt", **how)
    if name.endswith(".zst"):
        if importlib.util.find_spec("zstandard") is None:
            raise ValueError(
                f"{path} needs the package zstandard, which is not installed: pip install "
                f"zstandard, or unpack the file with `unzstd {path}`"
            )
        import zstandard

        return zstandard.open(source, "rt", **how)
    return open(name, **how) if source == name else io.TextIOWrapper(source, **how)


def expanded(names: list[str]) -> list[str]:
    """Returns the names with every pattern replaced by the files that it matches, in order.

    Raises ValueError for a pattern that matches none, and for a file that is named twice.
    """
    found: list[str] = []
    for name in names:
        if Path(name).exists() or not re.search(r"[*?\[]", name):
            found.append(name)
            continue
        matches = sorted(path for path in glob.glob(name, recursive=True) if Path(path).is_file())
        if not matches:
            raise ValueError(f"no file matches {name!r} (looked in {Path.cwd()})")
        found += matches
    if twice := next((name for name in found if found.count(name) > 1), None):
        raise ValueError(f"{twice} is named twice: name every file once")
    return found
