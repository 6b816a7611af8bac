"""Which data sets does a recipe ask for, and which split are their rows for?"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from datasets import Dataset, IterableDataset

if TYPE_CHECKING:
    # workers that tokenize need no torch
    from sftlab.config.recipe import DataArguments
from sftlab.data.read_rows import Wanted, read_rows
from sftlab.data.row_reading import RowReader
from sftlab.data.tokenized_dataset import SPLITS


class Source(NamedTuple):
    """Rows that are not converted yet, how they are read, and how many rows there are in all.

    `split` names the split that all rows belong to; None where their hash divides them by
    `fractions`. `weight` is that in a mixture. The number of rows of a stream is None.
    """

    rows: Dataset | IterableDataset
    reader: RowReader
    rows_there: int | None
    split: str | None
    fractions: tuple[float, ...]
    weight: float | None = None


def settings_of(source: Source) -> dict[str, Any]:
    """Returns how a source is read and divided, as JSON that `reading_of` takes."""
    return {
        "reader": source.reader._asdict(),
        "fractions": list(source.fractions),
        "split": source.split,
        "weight": source.weight,
        "rows": len(source.rows) if isinstance(source.rows, Dataset) else None,
        "rows_there": source.rows_there,
    }


def reading_of(settings: Mapping[str, Any]) -> tuple[RowReader, tuple[float, ...]]:
    """Returns a source's reader and its fractions from `settings_of`."""
    reader = RowReader(**settings["reader"])
    return reader._replace(files=tuple(reader.files)), tuple(settings["fractions"])


def read_sources(args: "DataArguments") -> list[Source]:
    """Returns the data sets of `args`: first those that are divided, then those of one split.

    A stream is not cut to `dataset_fraction`. Raises ValueError where rows cannot be read.
    """
    whole = Wanted(
        str(args.dataset_name),
        args.dataset_config,
        args.dataset_train_split,
        args.dataset_shape,
        args.columns or {},
        args.dataset_streaming,
        args.dataset_text_from_numbers,
    )
    shares = divided_fractions(args)
    parts = [(whole, None)]
    if args.datasets:
        parts = [(_part(whole, part), part.get("weight")) for part in args.datasets]
    sources = []
    for wanted, weight in parts:
        rows, reader = read_rows(wanted)
        there = len(rows) if isinstance(rows, Dataset) else None
        if there is not None:
            rows = rows.select(range(max(1, int(there * args.dataset_fraction))))
        sources.append(Source(rows, reader, there, None, shares, weight))
    for split, file, hub_split in own_splits(args):
        own = {"name": file, "hub_split": "train", "config": None} if file else {}
        rows, reader = read_rows(whole._replace(**(own or {"hub_split": hub_split})))
        there = len(rows) if isinstance(rows, Dataset) else None
        fractions = tuple(float(one == split) for one in SPLITS)
        sources.append(Source(rows, reader, there, split, fractions))
    return sources


def _part(whole: Wanted, part: Mapping[str, Any]) -> Wanted:
    """Returns one data set of a mixture. Shape and columns are the recipe's where it has none."""
    return whole._replace(
        name=part["name"],
        config=part.get("config"),
        hub_split=part.get("split", "train"),
        shape=part.get("shape", whole.shape),
        columns=part.get("columns", whole.columns),
    )


def own_splits(args: "DataArguments") -> list[tuple[str, str | None, str | None]]:
    """Returns the splits with rows of their own: name, files, and split of the hub's data set."""
    asked = (
        ("validation", args.validation_file, args.dataset_validation_split),
        ("test", args.test_file, args.dataset_test_split),
    )
    return [one for one in asked if one[1] or one[2]]


def divided_fractions(args: "DataArguments") -> tuple[float, ...]:
    """Returns the shares into which a hash divides rows: none for a split with rows of its own.

    The shares of the other splits keep their ratio.
    """
    own = [split for split, *_ in own_splits(args)]
    if not own:
        return tuple(args.split_fractions)
    shares = [
        0.0 if split in own else share
        for split, share in zip(SPLITS, args.split_fractions, strict=True)
    ]
    return tuple(share / sum(shares) for share in shares)
