"""Which local files does a data set's name mean, and of what kind are they?

A name is a file, a folder, a pattern such as data/*.jsonl, or several files.
"""

import codecs
import glob
import gzip
import io
import re
from pathlib import Path
from typing import IO, Any

import pyarrow
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
_BYTE_ORDER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
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

    A file that begins with the byte order mark of UTF-16 is read as that. Raises ValueError for a
    file that is not text.
    """
    file = _opened(str(path))
    try:
        begin = file.peek(2)
    except (EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    is_utf16 = begin.startswith(_BYTE_ORDER_MARKS)
    if b"\0" in begin and not is_utf16:
        raise ValueError(
            f"{path} is not text, or UTF-16 without a byte order mark: save it as UTF-8"
        )
    encoding = "utf-16" if is_utf16 else "utf-8-sig"
    return io.TextIOWrapper(file, encoding=encoding, newline=newline)


def _opened(name: str) -> Any:
    """Returns the bytes of a file, unpacked: a stream that can be peeked into."""
    source = HfFileSystem().open(name, "rb") if name.startswith(HUB) else name
    if name.endswith(".gz"):
        return gzip.open(source, "rb")
    if name.endswith(".zst"):
        packed = pyarrow.OSFile(name) if source == name else source
        return io.BufferedReader(pyarrow.CompressedInputStream(packed, "zstd"))
    return open(name, "rb") if source == name else io.BufferedReader(source)


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
