"""Rows read from the hub, a local file or a folder of files."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
from datasets import Dataset, IterableDataset, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

if TYPE_CHECKING:
    # workers that tokenize need no torch
    from sftlab.config.recipe import DataArguments
from sftlab.data.formats import DATA_FORMATS, recognise_format
from sftlab.data.text_rows import columns_of, read_text_rows

_READERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Source(NamedTuple):
    """Rows that are not converted yet, their data format, and how many rows there are in all.

    The number of a stream is None.
    """

    rows: Dataset | IterableDataset
    data_format: str
    rows_there: int | None


def read_source(args: "DataArguments") -> Source:
    """Returns the rows that `args` asks for.

    A stream is not cut to `dataset_fraction`. Raises ValueError where the rows cannot be read.
    """
    name = str(args.dataset_name)
    try:
        dataset = _load(args, name)
        columns = column_names(dataset)
    except (DatasetGenerationError, NotImplementedError, FileNotFoundError) as error:
        raise ValueError(
            f"{name} cannot be read: {_first_line(error.__cause__ or error)}"
        ) from error
    except pa.ArrowInvalid as error:
        raise ValueError(f"{name} cannot be read: {_first_line(error)}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} cannot be read: its first row is not JSON: {error}") from error
    data_format = args.dataset_shape or recognise_format(columns)
    _require_columns(columns, data_format)
    if isinstance(dataset, IterableDataset):
        return Source(dataset, data_format, None)
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty")
    rows = dataset.select(range(max(1, int(len(dataset) * args.dataset_fraction))))
    return Source(rows, data_format, len(dataset))


def _load(args: "DataArguments", name: str) -> Dataset | IterableDataset:
    path = Path(name)
    if not name.strip():
        raise ValueError("dataset_name is blank: give a data set of the hub, a file or a folder")
    if path.is_dir():
        return _load_folder(args, path)
    if path.suffix in _READERS or path.exists():
        return _load_file(args, path)
    _refuse_no_hub_name(name)
    return _load_from_hub(args, name)


def _load_file(args: "DataArguments", path: Path) -> Dataset | IterableDataset:
    if not path.is_file():
        raise ValueError(f"data file {path} not found (looked in {Path.cwd()})")
    if path.suffix not in _READERS:
        raise ValueError(
            f"{path}: unknown file type {path.suffix!r}; known are {', '.join(_READERS)}"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    for field, unset in (("dataset_config", None), ("dataset_train_split", "train")):
        if getattr(args, field) != unset:
            raise ValueError(
                f"{field} is {getattr(args, field)!r}, and {path} is a local file: leave it out, "
                "it is for data sets of the hub"
            )
    return _read([path], _READERS[path.suffix], args.dataset_streaming)


def _read(paths: list[Path], reader: str, streaming: bool) -> Dataset | IterableDataset:
    if reader in ("json", "csv"):
        return read_text_rows(paths, streaming)
    _refuse_pattern(paths[0])
    files = [str(path) for path in paths]
    return load_dataset(reader, data_files=files, split="train", streaming=streaming)


def _load_folder(args: "DataArguments", folder: Path) -> Dataset | IterableDataset:
    """Read the files that `datasets` finds for the split, each exactly as a single file is read."""
    _refuse_pattern(folder)
    split = args.dataset_train_split
    try:
        builder = load_dataset_builder(str(folder), args.dataset_config)
    except FileNotFoundError as error:
        raise ValueError(
            f"the folder {folder} holds no data files ({', '.join(_READERS)})"
        ) from error
    found = builder.config.data_files or {}
    if split not in found:
        raise ValueError(
            f"the folder {folder} has no split {split!r}: dataset_train_split can be "
            f"{', '.join(map(str, found)) or 'nothing'}"
        )
    paths = [Path(file) for file in found[split]]
    suffixes = {path.suffix for path in paths}
    if len({_READERS.get(suffix) for suffix in suffixes}) > 1 or not suffixes <= set(_READERS):
        raise ValueError(
            f"the folder {folder} holds files of the types {', '.join(sorted(suffixes))} for the "
            f"split {split!r}: give files of one type among {', '.join(_READERS)}"
        )
    return _read(paths, _READERS[paths[0].suffix], args.dataset_streaming)


def _refuse_pattern(path: Path) -> None:
    """Refuse a name that `datasets` would read as a pattern or a chain of file systems."""
    if found := re.search(r"[\[\]*?]|::", str(path.resolve())):
        raise ValueError(f"{path.resolve()} has {found[0]!r} in its name: rename it")


def _refuse_no_hub_name(name: str) -> None:
    """Refuse at once what is meant as a path, or is no name that the hub could have."""
    is_path = name.startswith((".", "/", "~", "data/", "runs/"))
    if is_path or (name.count("/") > 1 and ":" not in name):
        raise ValueError(f"data set {name} not found: no such file or folder in {Path.cwd()}")
    if not _HUB_NAME.fullmatch(name):
        raise ValueError(
            f"dataset_name {name!r} is neither a local file or folder nor a name of the hub "
            "(OWNER/NAME)"
        )


def _load_from_hub(args: "DataArguments", name: str) -> Dataset | IterableDataset:
    try:
        return load_dataset(
            name,
            args.dataset_config,
            split=args.dataset_train_split,
            streaming=args.dataset_streaming,
        )
    except GatedRepoError as error:
        raise ValueError(
            f"{name} is gated: ask for access on its page, then log in with `hf auth login`"
        ) from error
    except DatasetNotFoundError as error:
        raise ValueError(
            f"data set {name} is neither a local file ({', '.join(_READERS)}) nor on the hub under "
            "that name; a private or gated one needs `hf auth login`"
        ) from error
    except (OfflineModeIsEnabled, ConnectionError, HfHubHTTPError) as error:
        raise ValueError(
            f"data set {name} is not in the cache, and the hub cannot be reached: "
            f"{_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """Returns the columns; of JSON and of streams those of the first rows.

    Raises ValueError for a data set without rows.
    """
    if dataset.column_names is not None:
        return columns_of(dataset) or dataset.column_names
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("the data set is empty")
    return list(first)


def _require_columns(found: list[str], data_format: str) -> None:
    needed = DATA_FORMATS[data_format][0]
    if set(needed) - set(found):
        raise ValueError(
            f"dataset_shape {data_format} needs the columns {', '.join(needed)}; found "
            f"{', '.join(found)}"
        )
