"""Files that survive a kill and a power loss: written whole, synced, and hashed."""

import hashlib
import json
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Write JSON as `write_text` writes text."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file. A reader sees the old one or the new one, never a part."""
    part = part_of(path)
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        # after an error, such as a full disk, no part is left
        part.unlink(missing_ok=True)


def write_lines(path: Path, records: Iterable[Any]) -> None:
    """Write records as JSON, one a line, as `write_text` writes text."""
    write_text(path, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records))


def part_of(path: Path) -> Path:
    """Returns this process's temporary file for `path`."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")


def file_hash(path: Path) -> str:
    """Returns the SHA-256 of a file (hexadecimal)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Sync a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Sync a folder with all its contents to the disk."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        sync(path)
