"""Load a data set and assign every conversation in it to a split.

A row is a conversation (`messages` and `tools` as JSON), the numbers of its `answers` that are in
the loss, its `opening`, and `conversation`, the number of the source's row that it comes from.
"""

import hashlib
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset

from sftlab.data.converter import (
    FEATURES,
    NO_RESPONSE,
    NO_TURN,
    TEXT_COLUMNS,
    Converter,
)
from sftlab.data.row_notes import count_notes, unused_columns
from sftlab.data.sources import column_names, read_source
from sftlab.data.text_rows import JSON_ROW
from sftlab.data.tokenized_dataset import SPLITS, is_tokenized, open_tokens

if TYPE_CHECKING:
    # workers that tokenize need no torch
    from sftlab.config.recipe import DataArguments


class Splits(NamedTuple):
    """The three splits (`converter.TEXT_COLUMNS`) and their facts for run.json.

    For a tokenized data set, `tokens` is its manifest, and train and validation have the columns
    input_ids, spans and opening instead.
    """

    train: Dataset | IterableDataset
    validation: Dataset
    test: Dataset
    facts: dict[str, Any]
    tokens: dict[str, Any] | None = None


# rows of a stream whose notes stand for all
STREAM_LOOK = 256


def load_splits(args: "DataArguments", num_proc: int | None = None) -> Splits:
    """Load the data set that `args` names and split it by a hash of each conversation's opening.

    Raises ValueError for a missing file or data set, no access, unknown columns, an empty data set
    or split, and a row that is not text. It raises one too for tokens that were made from other
    rows or other splits than `args` says.
    """
    if is_tokenized(args.dataset_name):
        return Splits(*open_tokens(args))
    dataset, shape, rows_there = read_source(args)
    convert = Converter(shape, tuple(args.split_fractions), args.dataset_name, args.loss_on)
    facts = {"dataset": args.dataset_name, "shape": shape}
    if isinstance(dataset, IterableDataset):
        return _split_stream(dataset, convert, args, facts)
    rows = dataset.map(
        convert,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=FEATURES,
        num_proc=num_proc,
        desc="Reading rows",
    )
    table = rows.with_format("arrow")[:]
    split_of = table["split"].to_numpy()
    noted = pc.value_counts(table["notes"]).to_pylist()
    facts |= {"rows_there": rows_there, "rows_read": len(dataset)} | dropped_facts(
        split_of, table["conversation"].filter(pc.equal(table["split"], NO_TURN)).to_pylist()
    )
    facts |= count_notes((one["values"], one["counts"]) for one in noted)
    facts["not_used"] |= unused_columns(dataset, shape) if is_typed(dataset) else {}
    parts = []
    for index, name in enumerate(SPLITS):
        part = rows.select(np.flatnonzero(split_of == index))
        usable = int((split_of >= 0).sum())
        refuse_empty(len(part), name, args.dataset_name, args.split_fractions, usable)
        facts[name] = {"rows": len(part), "fingerprint": fingerprint(part["row_hash"])}
        parts.append(part.select_columns(list(TEXT_COLUMNS)))
    return Splits(*parts, facts)


def dropped_facts(split_of: np.ndarray, without_turn: list[int]) -> dict[str, Any]:
    """Returns how many answers and rows are in no split and why, for run.json.

    `without_turn` are the numbers of the rows without any answer to a user.
    """
    return {
        "empty_responses_dropped": int((split_of == NO_RESPONSE).sum()),
        "rows_without_an_answer": len(without_turn),
        "first_without_an_answer": without_turn[0] if without_turn else None,
    }


def is_typed(rows: Dataset) -> bool:
    """Whether the columns have types, unlike rows that are still JSON."""
    return rows.column_names != [JSON_ROW]


def fingerprint(row_hashes: Any) -> str:
    """Returns the SHA-256 over the rows' hashes, in order (16 hexadecimal digits)."""
    digest = hashlib.sha256()
    for row_hash in row_hashes:
        digest.update(row_hash.encode())
    return digest.hexdigest()[:16]


def refuse_empty(
    rows: int, split: str, dataset: str | None, fractions: list[float], total: int
) -> None:
    """Raise ValueError for a split that should have rows and has none."""
    if rows == 0 and fractions[SPLITS.index(split)] > 0:
        raise ValueError(
            f"the {split} split of {dataset} is empty: {total} usable rows with split_fractions "
            f"{fractions}; give more rows or other fractions (0 for a split that is not wanted)"
        )


def _split_stream(
    dataset: IterableDataset, convert: Converter, args: "DataArguments", facts: dict[str, Any]
) -> Splits:
    """Split a stream. Train stays one.

    Validation and test are their first `streaming_eval_rows` rows each, held in memory. Facts that
    are known only at the stream's end (rows, dropped responses) are None.
    """
    if args.dataset_fraction < 1:
        splits = dataset.info.splits or {}
        if args.dataset_train_split not in splits:
            raise ValueError(
                "dataset_fraction needs a data set whose number of rows is known; this stream's is "
                "not"
            )
        dataset = dataset.take(
            int(splits[args.dataset_train_split].num_examples * args.dataset_fraction)
        )
    first = convert_first(dataset, convert)
    rows = dataset.map(
        convert,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names or column_names(dataset),
        features=FEATURES,
    )
    parts = []
    for index, name in enumerate(SPLITS[1:], start=1):
        wanted = args.split_fractions[index] > 0
        kept = (
            list(rows.filter(partial(_in_split, index)).take(args.streaming_eval_rows))
            if wanted
            else []
        )
        refuse_empty(len(kept), name, args.dataset_name, args.split_fractions, 0)
        facts[name] = {"rows": len(kept), "fingerprint": fingerprint(r["row_hash"] for r in kept)}
        columns = {c: [r[c] for r in kept] for c in TEXT_COLUMNS}
        parts.append(Dataset.from_dict(columns, Features({c: FEATURES[c] for c in columns})))
    train = rows.filter(partial(_in_split, 0)).select_columns(list(TEXT_COLUMNS))
    if next(iter(train), None) is None:
        refuse_empty(0, "train", args.dataset_name, args.split_fractions, 0)
    facts |= {
        "streaming": True,
        "empty_responses_dropped": None,
        "train": {"rows": None, "fingerprint": None},
    } | count_notes((notes, 1) for notes in first["notes"])
    return Splits(train, *parts, facts)


def convert_first(dataset: IterableDataset, convert: Converter) -> dict[str, list]:
    """Returns the first rows of a stream, converted."""
    first = list(dataset.take(STREAM_LOOK))
    columns = {name: [row.get(name) for row in first] for name in (first[0] if first else {})}
    return convert(columns, list(range(len(first))))


def _in_split(index: int, row: dict[str, Any]) -> bool:
    return row["split"] == index
