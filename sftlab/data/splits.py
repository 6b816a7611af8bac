"""Convert data sets to prompt/completion rows, and assign every row to a split.

A row is `{"prompt": [message, ...], "completion": [assistant message]}` with messages of role and
content. That is trl's conversational prompt-completion format, whose loss is on the completion
alone. A conversation gives one row for each assistant turn, with the turns before it as prompt.
"""

import hashlib
import json
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, Value

from sftlab.data.formats import DATA_FORMATS, Message
from sftlab.data.row_notes import count_notes, parts_of, unused_columns, unused_parts
from sftlab.data.sources import column_names, read_source
from sftlab.data.text_rows import JSON_ROW, parse_row
from sftlab.data.tokenized_dataset import SPLITS, is_tokenized, open_tokens

if TYPE_CHECKING:
    # workers that tokenize need no torch
    from sftlab.config.recipe import DataArguments


_MESSAGES = [{"role": Value("string"), "content": Value("string")}]
FEATURES = Features(
    {
        "prompt": _MESSAGES,
        "completion": _MESSAGES,
        "split": Value("int8"),
        "row_hash": Value("string"),
        "notes": Value("string"),
    }
)
COLUMNS = tuple(FEATURES)


class Splits(NamedTuple):
    """The three splits (columns prompt and completion) and their facts for run.json.

    For a tokenized data set, `tokens` is its manifest, and train has the columns input_ids and
    prompt_length instead.
    """

    train: Dataset | IterableDataset
    validation: Dataset
    test: Dataset
    facts: dict[str, Any]
    tokens: dict[str, Any] | None = None


# rows of a stream whose notes stand for all
STREAM_LOOK = 256
# `split` of rows that are in none: without a response, or without any answer to a user
NO_RESPONSE, NO_TURN = -1, -2


class Converter:
    """Turns a batch of rows in one data format into prompt/completion rows.

    A row without any answer to a user gives one row with split `NO_TURN`, whose hash is its number.
    `notes` name what a row holds besides. It can be pickled, and `datasets` hashes it for its
    cache.
    """

    def __init__(self, shape: str, fractions: tuple[float, ...], name: str | None) -> None:
        self.shape, self.fractions, self.name = shape, fractions, name
        self.version = 2  # of what it makes: caches of other versions are not read

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        out: dict[str, list] = {name: [] for name in COLUMNS}
        for offset, index in enumerate(indices):
            try:
                row, notes = self._row(batch, offset)
                pairs = list(DATA_FORMATS[self.shape][2](row))
                for prompt, response in pairs:
                    notes += parts_of(prompt, response)
                    self._append(out, prompt, response, notes)
                    notes = []
            except (TypeError, ValueError, KeyError) as error:
                raise ValueError(f"row {index} of {self.name} ({self.shape}): {error}") from error
            if not pairs:
                nothing = ([], [], NO_TURN, str(index), "\n".join(notes))
                for name, value in zip(COLUMNS, nothing, strict=True):
                    out[name].append(value)
        return out

    def _row(self, batch: dict[str, list], offset: int) -> tuple[dict[str, Any], list[str]]:
        """Returns the columns of a row, and the names of what is not used of it."""
        needed, optional, _ = DATA_FORMATS[self.shape]
        if JSON_ROW not in batch:
            columns = [c for c in (*needed, *optional) if c in batch]
            row = {column: batch[column][offset] for column in columns}
            return row, unused_parts(row, self.shape)
        try:
            row = parse_row(batch[JSON_ROW][offset])
        except json.JSONDecodeError as error:
            raise ValueError(f"it is not JSON: {error}") from error
        if missing := [column for column in needed if column not in row]:
            raise ValueError(f"it has no {' and no '.join(missing)}, only {', '.join(row)}")
        return row, unused_parts(row, self.shape)

    def _append(
        self, out: dict[str, list], prompt: list[Message], response: str, notes: list[str]
    ) -> None:
        completion = [{"role": "assistant", "content": response}]
        text = json.dumps([prompt, completion], ensure_ascii=False, sort_keys=True)
        split = split_index(prompt, self.fractions) if response.strip() else NO_RESPONSE
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        out["prompt"].append(prompt)
        out["completion"].append(completion)
        out["split"].append(split)
        out["row_hash"].append(digest)
        out["notes"].append("\n".join(notes))


def load_splits(args: "DataArguments", num_proc: int | None = None) -> Splits:
    """Load the data set that `args` names and split its rows by a hash of their prompts.

    Raises ValueError for a missing file or data set, no access, unknown columns, an empty data set
    or split, and a row that is not text. It raises one too for tokens that were made from other
    rows or other splits than `args` says.
    """
    if is_tokenized(args.dataset_name):
        return Splits(*open_tokens(args))
    dataset, shape, rows_there = read_source(args)
    convert = Converter(shape, tuple(args.split_fractions), args.dataset_name)
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
        split_of, table["row_hash"].filter(pc.equal(table["split"], NO_TURN)).to_pylist()
    )
    facts |= count_notes((one["values"], one["counts"]) for one in noted)
    facts["not_used"] |= unused_columns(dataset, shape) if is_typed(dataset) else {}
    parts = []
    for index, name in enumerate(SPLITS):
        part = rows.select(np.flatnonzero(split_of == index))
        usable = int((split_of >= 0).sum())
        refuse_empty(len(part), name, args.dataset_name, args.split_fractions, usable)
        facts[name] = {"rows": len(part), "fingerprint": fingerprint(part["row_hash"])}
        parts.append(part.select_columns(["prompt", "completion"]))
    return Splits(*parts, facts)


def dropped_facts(split_of: np.ndarray, without_turn: list[str]) -> dict[str, Any]:
    """Returns how many rows are in no split and why, for run.json.

    `without_turn` are the numbers of the rows without any answer to a user.
    """
    return {
        "empty_responses_dropped": int((split_of == NO_RESPONSE).sum()),
        "rows_without_an_answer": len(without_turn),
        "first_without_an_answer": int(without_turn[0]) if without_turn else None,
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


def opening(prompt: list[Message]) -> str:
    """Returns the first user message of a prompt, with single spaces."""
    return " ".join(
        next((m["content"] for m in prompt if m["role"] == "user"), prompt[0]["content"]).split()
    )


def opening_key(prompt: list[Message]) -> int:
    """Returns 64 bits of the opening's SHA-256."""
    return int.from_bytes(hashlib.sha256(opening(prompt).encode()).digest()[:8], "big")


def split_index(prompt: list[Message], fractions: tuple[float, ...]) -> int:
    """Returns the split of a prompt: 0 train, 1 validation, 2 test.

    It depends on the opening alone, so it is the same on every machine and for every subset.
    Duplicates, the turns of a conversation and a question under several system prompts share it.
    """
    position = opening_key(prompt) / 2**64
    return int(np.searchsorted(np.cumsum(fractions)[:2], position, side="right"))


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
        columns = {c: [r[c] for r in kept] for c in ("prompt", "completion")}
        parts.append(Dataset.from_dict(columns))
    train = rows.filter(partial(_in_split, 0)).remove_columns(["split", "row_hash", "notes"])
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
