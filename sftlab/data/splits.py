"""Load a data set and assign every conversation in it to a split.

A row is a conversation (`messages` and `tools` as JSON), the numbers of its `answers` that are in
the loss, its `opening`, and `conversation`, the number of the source's row that it comes from.
"""

import hashlib
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, IterableDataset

from sftlab.data.converter import (
    FEATURES,
    PAIR_FEATURES,
    PAIRS,
    REJECTED,
    TEXT_COLUMNS,
    Converter,
)
from sftlab.data.leaks import known_rows
from sftlab.data.mixtures import joined, mixed, mixed_stream, weights_of
from sftlab.data.open_tokens import open_tokens
from sftlab.data.read_rows import column_names
from sftlab.data.row_notes import count_notes
from sftlab.data.source_facts import (
    refuse_empty,
    row_facts,
    shape_facts,
    source_facts,
    source_settings,
)
from sftlab.data.sources import Source, own_splits, read_sources, settings_of
from sftlab.data.tokenized_dataset import SPLITS, is_tokenized

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
    sources = read_sources(args)
    facts = {"dataset": args.dataset_name} | shape_facts(sources)
    if args.dataset_streaming:
        return _split_streams(sources, args, facts)
    converted = [
        _convert(source, number, args.loss_on, num_proc) for number, source in enumerate(sources)
    ]
    facts |= row_facts(sources, converted)
    divided = [source for source in sources if source.split is None]
    pieces = [[_of_split(rows, index) for rows in converted] for index in range(len(SPLITS))]
    weights = weights_of([source.weight for source in divided])
    train = mixed(pieces[0][: len(divided)], weights, args.datasets_stopping_strategy)
    parts, left_out = _without_known([train, joined(pieces[1]), joined(pieces[2])], args)
    facts |= left_out
    for name, part in zip(SPLITS, parts, strict=True):
        own = next((source.reader.name for source in sources if source.split == name), None)
        keys = [] if len(part) else [one.with_format("numpy")["opening"][:] for one in parts]
        refuse_empty(len(part), name, args.dataset_name, args.split_fractions, keys, facts, own)
        facts[name] = {"rows": len(part), "fingerprint": fingerprint(part["row_hash"])}
    if len(sources) > 1:
        numbers = [part.with_format("numpy")["source"][:] for part in parts]
        before = [len(piece) for piece in pieces[0]]
        facts["sources"] = source_facts([settings_of(one) for one in sources], numbers, before)
    columns = [*TEXT_COLUMNS, *([REJECTED] if facts["shape"] == PAIRS else [])]
    train = parts[0].select_columns([*columns, *(["source"] if len(divided) > 1 else [])])
    return Splits(train, *(part.select_columns(columns) for part in parts[1:]), facts)


def _convert(source: Source, number: int, loss_on: str, num_proc: int | None) -> Dataset:
    """Returns the converted rows of a source. The column `source` has its number."""
    rows = source.rows.map(
        Converter(source.reader, source.fractions, loss_on, number),
        batched=True,
        with_indices=True,
        remove_columns=source.rows.column_names,
        features=PAIR_FEATURES if source.reader.data_format == PAIRS else FEATURES,
        num_proc=num_proc,
        desc="Reading rows",
    )
    return rows.add_column("source", np.full(len(rows), number, np.int8))


def _without_known(
    parts: list[Dataset], args: "DataArguments"
) -> tuple[list[Dataset], dict[str, Any]]:
    """Returns train, validation and test without rows of own files that are known from another."""
    own = [split for split, *_ in own_splits(args)]
    if not own:
        return parts, {}
    openings = [part.with_format("numpy")["opening"][:] for part in parts]
    known, facts = known_rows(openings, own)
    kept = [
        part.select(np.flatnonzero(~known[name])) if name in known else part
        for name, part in zip(SPLITS, parts, strict=True)
    ]
    return kept, facts


def _of_split(rows: Dataset, index: int) -> Dataset:
    return rows.select(np.flatnonzero(rows.with_format("arrow")[:]["split"].to_numpy() == index))


def fingerprint(row_hashes: Any) -> str:
    """Returns the SHA-256 over the rows' hashes, in order (16 hexadecimal digits)."""
    digest = hashlib.sha256()
    for row_hash in row_hashes:
        digest.update(row_hash.encode())
    return digest.hexdigest()[:16]


def _split_streams(sources: list[Source], args: "DataArguments", facts: dict[str, Any]) -> Splits:
    """Split streams. Train stays one.

    Validation and test are their first `streaming_eval_rows` rows each, held in memory. Facts that
    are known only at the stream's end (rows, dropped responses) are None.
    """
    notes: list[str] = []
    streams = []
    for number, source in enumerate(sources):
        rows = source.rows if source.split else first_share(source.rows, args)
        convert = Converter(source.reader, source.fractions, args.loss_on, number)
        notes += convert_first(rows, convert)["notes"]
        columns = rows.column_names or column_names(rows)
        mapped = {"batched": True, "with_indices": True, "remove_columns": columns}
        streams.append(rows.map(convert, features=FEATURES, **mapped))
    held_out, left_out = _held_out_of_streams(sources, streams, args)
    parts = []
    for name, kept in zip(SPLITS[1:], held_out, strict=True):
        own = next((source.reader.name for source in sources if source.split == name), None)
        refuse_empty(len(kept), name, args.dataset_name, args.split_fractions, own=own)
        facts[name] = {"rows": len(kept), "fingerprint": fingerprint(r["row_hash"] for r in kept)}
        columns = {c: [r[c] for r in kept] for c in TEXT_COLUMNS}
        parts.append(Dataset.from_dict(columns, Features({c: FEATURES[c] for c in columns})))
    divided = [source for source in sources if source.split is None]
    known = _openings_of_own(parts, args)
    train = mixed_stream(
        [rows.filter(partial(_is_trained, known)) for rows in streams[: len(divided)]],
        weights_of([source.weight for source in divided]),
        args.datasets_stopping_strategy,
    ).select_columns(list(TEXT_COLUMNS))
    if next(iter(train), None) is None:
        refuse_empty(0, "train", args.dataset_name, args.split_fractions)
    facts |= {
        "streaming": True,
        "empty_responses_dropped": None,
        "train": {"rows": None, "fingerprint": None},
    } | count_notes((one, 1) for one in notes)
    facts |= left_out
    if len(sources) > 1:
        facts["sources"] = [source_settings(settings_of(source)) for source in sources]
    return Splits(train, *parts, facts)


def first_share(rows: IterableDataset, args: "DataArguments") -> IterableDataset:
    """Returns the first `dataset_fraction` of a stream. Raises ValueError for an unknown length."""
    if args.dataset_fraction == 1:
        return rows
    splits = rows.info.splits or {}
    if args.dataset_train_split not in splits:
        raise ValueError(
            "dataset_fraction needs a data set whose number of rows is known; this stream's is not"
        )
    return rows.take(int(splits[args.dataset_train_split].num_examples * args.dataset_fraction))


def _first_of_split(
    sources: list[Source], streams: list[IterableDataset], index: int, most: int
) -> list[dict[str, Any]]:
    """Returns the first `most` rows of a split, as many of every source that has such rows."""
    having = [
        rows for source, rows in zip(sources, streams, strict=True) if source.fractions[index] > 0
    ]
    kept: list[dict[str, Any]] = []
    for number, rows in enumerate(having):
        of_one = (most - len(kept)) // (len(having) - number)
        kept += rows.filter(partial(_in_split, index)).take(of_one)
    return kept


def _held_out_of_streams(
    sources: list[Source], streams: list[IterableDataset], args: "DataArguments"
) -> tuple[list[list[dict[str, Any]]], dict[str, Any]]:
    """Returns the rows of validation and test, and how many of own files another split has."""
    parts = [_first_of_split(sources, streams, index, args.streaming_eval_rows) for index in (1, 2)]
    openings = [np.array([row["opening"] for row in part], np.int64) for part in parts]
    own = [split for split, *_ in own_splits(args)]
    known, facts = known_rows([np.zeros(0, np.int64), *openings], own)
    kept = [
        [row for row, is_known in zip(part, known[name], strict=True) if not is_known]
        if name in known
        else part
        for name, part in zip(SPLITS[1:], parts, strict=True)
    ]
    return kept, facts


def _openings_of_own(parts: list[Dataset], args: "DataArguments") -> frozenset[int]:
    """Returns the keys of the questions that own validation and test rows ask."""
    own = [split for split, *_ in own_splits(args)]
    kept = [part["opening"] for name, part in zip(SPLITS[1:], parts, strict=True) if name in own]
    return frozenset(opening for openings in kept for opening in openings)


def convert_first(dataset: IterableDataset, convert: Converter) -> dict[str, list]:
    """Returns the first rows of a stream, converted."""
    first = list(dataset.take(STREAM_LOOK))
    columns = {name: [row.get(name) for row in first] for name in (first[0] if first else {})}
    return convert(columns, list(range(len(first))))


def _is_trained(known: frozenset[int], row: dict[str, Any]) -> bool:
    """Whether a row is for training, and asks nothing that is `known` from another split."""
    return row["split"] == 0 and row["opening"] not in known


def _in_split(index: int, row: dict[str, Any]) -> bool:
    return row["split"] == index
