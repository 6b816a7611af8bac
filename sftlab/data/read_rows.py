"""The rows of one data set, read from the hub, from local files or from a folder of files."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from datasets import Dataset, IterableDataset, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

from sftlab.config.data_words import single_names
from sftlab.data.column_names import read_columns
from sftlab.data.data_files import HUB, TEXT_KINDS, expanded, file_kind, known_types
from sftlab.data.hub_files import downloaded, hub_files
from sftlab.data.row_reading import RowReader
from sftlab.data.text_rows import columns_of, read_text_rows
from sftlab.exit_messages import first_line

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Wanted(NamedTuple):
    """One data set that is asked for: where it is, and how its rows are read."""

    name: str
    config: str | None = None
    hub_split: str = "train"
    shape: str | None = None
    columns: Mapping[str, str] = {}
    streaming: bool = False
    numbers_as_text: bool = False


def _columns(rows: Dataset | IterableDataset, name: str) -> list[str]:
    """Returns the columns. Raises ValueError where the first row of JSON has none."""
    try:
        return column_names(rows)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} cannot be read: its first row is not JSON: {error}") from error
    except ValueError as error:
        if f"{error}".startswith((name, HUB)):  # it names a file of several
            raise
        raise ValueError(f"{name} cannot be read: {error}") from error


def read_rows(wanted: Wanted) -> tuple[Dataset | IterableDataset, RowReader]:
    """Returns the rows of a data set as they are, and how they are read.

    Raises ValueError where they cannot be read, and where there are none.
    """
    name = wanted.name
    try:
        dataset, files = _load(wanted)
        found = _columns(dataset, name)
    except (DatasetGenerationError, NotImplementedError, FileNotFoundError) as error:
        raise ValueError(
            f"{name} cannot be read: {first_line(error.__cause__ or error)}"
        ) from error
    except pa.ArrowInvalid as error:
        raise ValueError(f"{name} cannot be read: {first_line(error)}") from error
    data_format, columns = read_columns(found, wanted.shape, wanted.columns, name)
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"{name} is empty")
    several = tuple(map(str, files)) if len(files) > 1 else ()
    return dataset, RowReader(name, data_format, columns, wanted.numbers_as_text, several)


def _load(wanted: Wanted) -> tuple[Dataset | IterableDataset, list[Path]]:
    """Returns the rows, and the local files that they are in."""
    if not wanted.name.strip():
        raise ValueError("dataset_name is blank: give a data set of the hub, a file or a folder")
    names = single_names(wanted.name)
    paths = [Path(name) for name in expanded(names)]
    if len(names) == len(paths) == 1:
        if paths[0].is_dir():
            return _load_folder(wanted, paths[0])
        if "://" in wanted.name or (file_kind(paths[0]) is None and not paths[0].exists()):
            _refuse_no_hub_name(wanted.name)
            return _load_from_hub(wanted)
    return _load_files(wanted, paths), paths


def _load_files(wanted: Wanted, paths: list[Path]) -> Dataset | IterableDataset:
    for path in paths:
        _refuse_no_data_file(path, several=len(paths) > 1)
    _refuse_several_kinds(paths, wanted.name)
    for field, value, unset in (
        ("dataset_config", wanted.config, None),
        ("dataset_train_split", wanted.hub_split, "train"),
    ):
        if value != unset:
            raise ValueError(
                f"{field} is {value!r}, and {wanted.name} is a local file: leave it out, "
                "it is for data sets of the hub"
            )
    return _read(paths, wanted.streaming)


def _refuse_no_data_file(path: Path, several: bool) -> None:
    if several and path.is_dir():
        raise ValueError(f"{path} is a folder among several files: name its files, or it alone")
    if not path.is_file():
        other = "; data sets of the hub are mixed with --datasets" if several else ""
        raise ValueError(f"data file {path} not found (looked in {Path.cwd()}){other}")
    if file_kind(path) is None:
        kind = "".join(path.suffixes[-2:])
        raise ValueError(f"{path}: unknown file type {kind!r}; known are {known_types()}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")


def _refuse_several_kinds(paths: Sequence[Path | str], place: str) -> None:
    kinds = {file_kind(path) for path in paths}
    if len(kinds) > 1 or None in kinds:
        suffixes = {"".join(Path(path).suffixes) for path in paths}
        raise ValueError(
            f"{place} holds files of the types {', '.join(sorted(suffixes))}: give files of one "
            f"type among {known_types()}"
        )


def _read(paths: list[Path], streaming: bool) -> Dataset | IterableDataset:
    kind = file_kind(paths[0])
    if kind in TEXT_KINDS:
        return read_text_rows(paths, streaming)
    for path in paths:
        _refuse_pattern(path)
    files = [str(path) for path in paths]
    return load_dataset(kind, data_files=files, split="train", streaming=streaming)


def _load_folder(wanted: Wanted, folder: Path) -> tuple[Dataset | IterableDataset, list[Path]]:
    """Read the files that `datasets` finds for the split, each exactly as a single file is read."""
    _refuse_pattern(folder)
    split = wanted.hub_split
    try:
        builder = load_dataset_builder(str(folder.resolve()), wanted.config)
    except FileNotFoundError as error:
        raise ValueError(f"the folder {folder} holds no data files: {known_types()}") from error
    found = builder.config.data_files or {}
    if split not in found:
        raise ValueError(
            f"the folder {folder} has no split {split!r}: it has "
            f"{', '.join(map(str, found)) or 'none'}"
        )
    paths = [Path(file) for file in found[split]]
    _refuse_several_kinds(paths, f"the split {split!r} of the folder {folder}")
    return _read(paths, wanted.streaming), paths


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


def _load_from_hub(wanted: Wanted) -> tuple[Dataset | IterableDataset, list[Path]]:
    """Returns the rows, and their local files where they are text. A stream downloads no file."""
    name, config, split = wanted.name, wanted.config, wanted.hub_split
    try:
        addresses = hub_files(name, config, split)
        if addresses is None:
            return load_dataset(name, config, split=split, streaming=wanted.streaming), []
        _refuse_several_kinds(addresses, f"the split {split!r} of {name}")
        if wanted.streaming:
            return read_text_rows(addresses, streaming=True), []
        paths = list(map(downloaded, addresses))
        return read_text_rows(paths, streaming=False), paths
    except GatedRepoError as error:
        raise ValueError(
            f"{name} is gated: ask for access on its page, then log in with `hf auth login`"
        ) from error
    except DatasetNotFoundError as error:
        raise ValueError(
            f"data set {name} is neither a local file ({known_types()}) nor on the hub under "
            "that name; a private or gated one needs `hf auth login`"
        ) from error
    except (OfflineModeIsEnabled, ConnectionError, HfHubHTTPError) as error:
        raise ValueError(
            f"data set {name} is not in the cache, and the hub cannot be reached: "
            f"{first_line(error)}"
        ) from error


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
