"""What tells one base model or tokenizer from another: hashes of the files that decide answers."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

# Files up to this size are hashed whole. Of a larger one, both ends and the time of its last
# change count: hashing 16 GB would take longer than loading them.
_WHOLE = 2**30
_EDGE = 2**20
_BASE = ("config.json", "generation_config.json", "model.safetensors.index.json")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def base_identity(name: str, revision: str | None) -> str | None:
    """Returns a hash of a base model's folder (16 hexadecimal digits), or a hub model's commit.

    None where the hub's cache does not hold the model.
    """
    folder = Path(name)
    if folder.is_dir():
        weights = sorted(folder.glob("*.safetensors"))
        return _hash([*(folder / one for one in _BASE), *weights])
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision or "main")
    except HFValidationError:
        return None
    return Path(cached).parent.name if isinstance(cached, str) else None


def tokenizer_identity(folder: Path) -> str:
    """Returns a hash of a tokenizer's files (16 hexadecimal digits)."""
    return _hash(folder / one for one in _TOKENIZER)


def _hash(files: Iterable[Path]) -> str:
    seen = hashlib.sha256()
    for path in files:
        if not path.is_file():
            continue
        state = path.stat()
        seen.update(f"{path.name} {state.st_size} ".encode())
        with path.open("rb") as file:
            if state.st_size <= _WHOLE:
                seen.update(hashlib.file_digest(file, "sha256").digest())
            else:
                seen.update(f"{state.st_mtime_ns} ".encode() + file.read(_EDGE))
                file.seek(-_EDGE, 2)
                seen.update(file.read(_EDGE))
    return seen.hexdigest()[:16]
