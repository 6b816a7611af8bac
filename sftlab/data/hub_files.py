"""The JSON and CSV files of a data set on the hub, which are read as local files are.

`datasets` gives their columns types, and 00199 becomes 199. Which files a split has is kept, so
that it can be read again where the hub cannot be reached.
"""

import re
from hashlib import sha256
from pathlib import Path
from urllib.parse import unquote

import datasets
from datasets import DatasetBuilder, load_dataset_builder
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled

from sftlab.files import write_json
from sftlab.schema import TEXT, check, list_of, read_object

_ADDRESS = re.compile(r"hf://datasets/(?P<repo>[^@]+)@(?P<revision>[^/]+)/(?P<path>.+)")
# what the card of a data set may say of how its files are read
_READING = {
    "csv": ("sep", "header", "names", "skiprows", "skipfooter", "quotechar", "comment", "encoding"),
    "json": ("field", "encoding"),
}


def hub_files(name: str, config: str | None, split: str) -> list[str] | None:
    """Returns the addresses (hf://...) of a split's JSON or CSV files; None for other files.

    Raises ValueError for a split that is not there, and for files that need a reading of their own.
    """
    kept = _listing(name, config, split)
    try:
        builder = load_dataset_builder(name, config)
    except (OfflineModeIsEnabled, ConnectionError):
        if kept.is_file():
            return _read_listing(kept)
        raise
    kind = builder.info.builder_name
    if kind not in _READING:
        return None
    files = builder.config.data_files
    if files is None:  # `datasets` has the typed rows alone, of a time when the hub was reached
        if kept.is_file():
            return _read_listing(kept)
        raise OfflineModeIsEnabled("only rows with types are in the cache, not the files")
    _refuse_own_reading(name, builder, kind)
    if split not in files:
        raise ValueError(
            f"data set {name} has no split {split!r}: it has {', '.join(map(str, files))}"
        )
    addresses = [str(file) for file in files[split]]
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, {"files": addresses})
    return addresses


def downloaded(address: str) -> Path:
    """Returns the local copy of a file on the hub, downloaded unless it is in the cache."""
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise ValueError(
            f"{address} is no file of a data set: download it, and give it by its path"
        )
    try:
        path = hf_hub_download(
            found["repo"], found["path"], repo_type="dataset", revision=unquote(found["revision"])
        )
    except EntryNotFoundError as error:
        raise OfflineModeIsEnabled(f"{found['path']} is not in the cache") from error
    return Path(path)


def _listing(name: str, config: str | None, split: str) -> Path:
    """Returns where the addresses of a split's files are kept."""
    wanted = sha256(repr((name, config, split)).encode()).hexdigest()[:16]
    return Path(datasets.config.HF_DATASETS_CACHE) / "hub_files" / f"{wanted}.json"


def _read_listing(path: Path) -> list[str]:
    found = read_object(path)
    check(found, str(path), {"files": list_of(TEXT)})
    return found["files"]


def _refuse_own_reading(name: str, builder: DatasetBuilder, kind: str) -> None:
    plain = type(builder.config)()
    for field in _READING[kind]:
        value = getattr(builder.config, field)
        if value != getattr(plain, field) and (field, value) != ("sep", "\t"):
            raise ValueError(
                f"the card of {name} has {field}: {value!r} for its {kind} files, which cannot be "
                "read here: download the files, write them as plain JSON or CSV, and name those"
            )
