"""In which order are the rows of a tokenized data set trained on? Read from its lists of rows.

The files hold rows as their shards made them. A mixture takes them in the order that the text
itself would have, and rows of an own file that are known from another split are left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sftlab.data.leaks import known_rows
from sftlab.data.mixtures import even_order, rows_of_an_epoch, weights_of
from sftlab.data.tokenized_dataset import SPLITS, file_name


class OrderedRows(NamedTuple):
    """The rows of each split in their order, as tables.

    They have the columns of the lists of rows, the number of the `source`, and the `row`'s index in
    its split. `place` holds the index of each of its sequences among all kept ones of its split, or
    behind them among the dropped ones. `before` are the training rows of each source before they
    are mixed, `left_out` is the fact of rows that are known from another split.
    """

    tables: dict[str, pa.Table]
    before: list[int]
    left_out: dict[str, Any]


def ordered_rows(
    folder: Path, settings: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> OrderedRows:
    """Returns the rows of a tokenized data set in order. `records` are those of all its shards."""
    tables = {name: _rows_of(folder, records, index) for index, name in enumerate(SPLITS)}
    sources = settings["sources"]
    divided = sum(source["split"] is None for source in sources)
    train = tables["train"]
    rows = np.bincount(train["source"].to_numpy(), minlength=divided).tolist()
    if divided > 1:
        weights = weights_of([source["weight"] for source in sources[:divided]])
        counts = rows_of_an_epoch(rows, weights, settings["datasets_stopping_strategy"])
        tables["train"] = train.take(pa.array(even_order(rows, counts)))
    openings = [tables[name]["opening"].to_numpy() for name in SPLITS]
    own = [source["split"] for source in sources if source["split"]]
    known, left_out = known_rows(openings, own)
    for name, of_split in known.items():
        tables[name] = tables[name].filter(pa.array(~of_split))
    return OrderedRows(tables, rows, left_out)


def _rows_of(folder: Path, records: Sequence[Mapping[str, Any]], index: int) -> pa.Table:
    """Returns the rows of one split, shard by shard."""
    found = [table.filter(pc.equal(table["split"], index)) for table in row_lists(folder, records)]
    table = pa.concat_tables(found)
    sequences = pc.list_value_length(table["loss_kept"]).to_numpy()
    kept = flat(table, "loss_kept") > 0
    place = np.where(kept, np.cumsum(kept) - 1, kept.sum() + np.cumsum(~kept) - 1)
    offsets = np.cumsum([0, *sequences]).astype(np.int32)
    places = pa.ListArray.from_arrays(pa.array(offsets), pa.array(place))
    table = table.append_column("row", pa.array(np.arange(len(table))))
    return table.append_column("place", places)


def flat(table: pa.Table, column: str) -> np.ndarray:
    """Returns the values of a column of lists, behind one another."""
    return pc.list_flatten(table[column]).to_numpy()


def row_lists(folder: Path, records: Sequence[Mapping[str, Any]]) -> Iterator[pa.Table]:
    """Yield the list of rows of each shard, with the number of its `source`."""
    for record in records:
        name = file_name("rows", record["number"])
        if name in record["files"]:
            with pa.OSFile(str(folder / name)) as file:
                table = pa.ipc.open_stream(file).read_all()
            source = pa.array(np.full(len(table), record["source"], np.int8))
            yield table.append_column("source", source)
