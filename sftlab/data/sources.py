"""Rows read from the hub or a local file."""

from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

if TYPE_CHECKING:
    # workers that tokenize need no torch
    from sftlab.config.recipe import DataArguments
from sftlab.data.formats import DATA_FORMATS, recognise_format

_READERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}


def read_source(args: "DataArguments") -> tuple[Dataset | IterableDataset, str]:
    """Returns the rows that `args` asks for, not converted yet, and their data format.

    A stream is not cut to `dataset_fraction`. Raises ValueError where the rows cannot be read.
    """
    dataset = _load(args)
    data_format = args.dataset_shape or recognise_format(column_names(dataset))
    _require_columns(dataset, data_format)
    if isinstance(dataset, IterableDataset):
        return dataset, data_format
    if len(dataset) == 0:
        raise ValueError(f"{args.dataset_name} is empty")
    return dataset.select(range(max(1, int(len(dataset) * args.dataset_fraction)))), data_format


def _load(args: "DataArguments") -> Dataset | IterableDataset:
    name = str(args.dataset_name)
    path = Path(name)
    streaming = args.dataset_streaming
    try:
        if path.suffix in _READERS:
            if not path.is_file():
                raise ValueError(f"data file {name} not found (looked in {Path.cwd()})")
            if path.stat().st_size == 0:
                raise ValueError(f"{name} is empty")
            reader = _READERS[path.suffix]
            # "None", "NA" and "null" are text
            options = {"keep_default_na": False} if reader == "csv" else {}
            return load_dataset(
                reader, data_files=name, split="train", streaming=streaming, **options
            )
        if path.is_file():
            raise ValueError(
                f"{name}: unknown file type {path.suffix!r}; known are {', '.join(_READERS)}"
            )
        return load_dataset(
            name, args.dataset_config, split=args.dataset_train_split, streaming=streaming
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
    except DatasetGenerationError as error:
        raise ValueError(
            f"{name} cannot be read: {_first_line(error.__cause__ or error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """Returns the columns, for a stream from its first row. Raises ValueError for an empty one."""
    if dataset.column_names is not None:
        return dataset.column_names
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("the data set is empty")
    return list(first)


def _require_columns(dataset: Dataset | IterableDataset, data_format: str) -> None:
    needed, found = DATA_FORMATS[data_format][0], column_names(dataset)
    if set(needed) - set(found):
        raise ValueError(
            f"dataset_shape {data_format} needs the columns {', '.join(needed)}; found "
            f"{', '.join(found)}"
        )
