"""What a worker does: it converts, encodes and writes rows of a data set as one shard."""

import json
import os
import pickle
import re
from collections.abc import Mapping
from datetime import date
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tokenizers import Tokenizer

from sftlab.data.batch_encoder import Encoder
from sftlab.data.converter import COLUMNS, NO_TURN, TEST, TEXT_COLUMNS, Converter
from sftlab.data.messages import Conversation
from sftlab.data.sequence_facts import Cut, cut_sequences
from sftlab.data.sources import reading_of
from sftlab.data.template_errors import (
    TEMPLATE_ERRORS,
    is_of_template,
    refusals_of,
    rendering_limit,
)
from sftlab.data.tokenized_dataset import (
    MANIFEST,
    SCHEMAS,
    SPLITS,
    file_name,
    read_manifest,
    record_path,
)
from sftlab.files import file_hash, part_of, write_text

# rows that are converted and encoded together
ROWS_AT_ONCE = 128
# rows, and tokens or characters, that are gathered before they are written
ROWS_A_BATCH = 1000
ITEMS_A_BATCH = 1_000_000


def place_of(rows: Dataset, start: int, stop: int, source: int = 0) -> bytes:
    """Returns the files and the range of memory-mapped rows of a source, to be sent to a worker.

    They are pickled, because the scheduler would otherwise map the files anew for every task.
    """
    return pickle.dumps((rows.select(range(start, stop)), start, source))


def tokenize_shard(folder: str, number: int, place: bytes) -> dict[str, Any]:
    """Convert, encode and write the rows at `place` as one shard. Returns its record.

    The bytes depend on the rows and the manifest alone. Rows that are not text are left out and
    counted. Raises ValueError where the template writes the date and the day is over.
    """
    rows, first, source = pickle.loads(place)
    manifest, encoder = _loaded(folder, (Path(folder) / MANIFEST).stat().st_mtime_ns)
    settings = manifest["settings"]
    if settings.get("day", date.today().isoformat()) != date.today().isoformat():
        raise ValueError(
            f"the template writes the date, and {settings['day']} is over: tokenize into another "
            "folder"
        )
    reading = reading_of(settings["sources"][source])
    convert = Converter(*reading, settings["loss_on"], source)
    record: dict[str, Any] = {
        "number": number,
        "source": source,
        "source_rows": len(rows),
        "bad": 0,
        "first_bad": None,
        "notes": {},
        "without_turn": [],
        "control_marks": 0,
    }
    writers = {kind: _Writer(Path(folder) / file_name(kind, number), kind) for kind in SCHEMAS}
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = rows[start : start + ROWS_AT_ONCE]
        converted = convert_counting(convert, batch, first + start, record)
        _note(converted, record, encoder.marks)
        try:
            with rendering_limit("some rows"):
                _encode(converted, encoder, settings, writers)
        except TEMPLATE_ERRORS as error:
            if is_of_template(error):
                refuse_rendering(batch, first + start, convert, encoder)
            raise
    record["files"] = {
        writer.path.name: facts for writer in writers.values() if (facts := writer.close())
    }
    write_text(record_path(folder, number), json.dumps(record) + "\n")
    return record


def convert_counting(
    convert: Converter, batch: dict[str, list], first: int, record: dict[str, Any]
) -> dict[str, list]:
    """Convert a batch without the rows that are not text.

    `record` counts those ('bad') and keeps the first one's error ('first_bad').
    """
    size = len(next(iter(batch.values())))
    try:
        return convert(batch, list(range(first, first + size)))
    except ValueError:
        found: dict[str, list] = {}
    for offset in range(size):
        try:
            one = convert(
                {name: values[offset : offset + 1] for name, values in batch.items()},
                [first + offset],
            )
        except ValueError as error:
            record["bad"] += 1
            record["first_bad"] = record["first_bad"] or str(error)
            continue
        for name, values in one.items():
            found.setdefault(name, []).extend(values)
    return found or {name: [] for name in COLUMNS}


def refuse_rendering(
    batch: dict[str, list], first: int, convert: Converter, encoder: Encoder
) -> None:
    """Raise ValueError with the number of the row of a batch that the template refuses."""
    for offset in range(len(next(iter(batch.values())))):
        row = {name: values[offset : offset + 1] for name, values in batch.items()}
        one = convert_counting(convert, row, first + offset, {"bad": 0, "first_bad": None})
        advice = "; leave the row out or give another template with --chat_template_path"
        with refusals_of(convert.reader.place(first + offset), advice):
            encoder.refuse([read for _, read in conversations(one)])


def conversations(converted: dict[str, list]) -> list[tuple[int, Conversation]]:
    """Returns the converted rows that are in a split: the split's number, and the conversation."""
    columns = ("messages", "tools", "answers")
    rows = zip(converted["split"], *(converted[name] for name in columns), strict=True)
    return [
        (split, Conversation.from_row(dict(zip(columns, values, strict=True))))
        for split, *values in rows
        if split >= 0
    ]


def _note(
    converted: dict[str, list], record: dict[str, Any], marks: re.Pattern[str] | None
) -> None:
    """Count the rows' notes and control marks, and keep the numbers of rows without an answer."""
    for notes, split, number in zip(
        converted["notes"], converted["split"], converted["conversation"], strict=True
    ):
        if notes:
            record["notes"][notes] = record["notes"].get(notes, 0) + 1
        if split == NO_TURN:
            record["without_turn"].append(number)
    if marks is not None:
        record["control_marks"] += sum(map(bool, map(marks.search, converted["messages"])))


def _encode(
    rows: dict[str, list],
    encoder: Encoder,
    settings: Mapping[str, Any],
    writers: Mapping[str, "_Writer"],
) -> None:
    """Encode and write a batch of converted rows."""
    read = conversations(rows)
    encoder.refuse([one for split, one in read if split == TEST])
    encoded = encoder([one for split, one in read if split != TEST])
    for index, split in enumerate(rows["split"]):
        row = {name: rows[name][index] for name in (*TEXT_COLUMNS, "row_hash", "split")}
        cut = cut_sequences(next(encoded), settings) if split in (0, 1) else []
        _refuse_beyond_model(cut, settings, row["messages"])
        counts = ("tokens", "loss_tokens", "loss_kept", "part")
        counted = {name: [getattr(one, name) for one in cut] for name in counts}
        writers["rows"].add(row | counted, True)
        if split == TEST:
            writers["test"].add(row, True)
        for one in cut:
            sequence = {"input_ids": one.ids, "spans": one.spans, "opening": row["opening"]}
            writers[SPLITS[split]].add(sequence, one.loss_kept > 0)


def _refuse_beyond_model(cut: list[Cut], settings: Mapping[str, Any], messages: str) -> None:
    """Raise ValueError for sequences that the model cannot take."""
    embeddings, positions = settings.get("embeddings"), settings.get("positions")
    largest = max((max(one.ids, default=0) for one in cut), default=0)
    if embeddings and largest >= embeddings:
        raise ValueError(
            f"a row has the token id {largest}, and the model has {embeddings} embeddings: its "
            "tokenizer belongs to another model, or tokens were added without resizing the "
            f"embedding ({messages:.80})"
        )
    longest = max((len(one.ids) for one in cut if one.loss_kept), default=0)
    if positions and longest > positions:
        raise ValueError(
            f"a row has {longest:,} tokens, and the model has {positions:,} positions: pass "
            f"--max_length {positions} or less ({messages:.80})"
        )


@lru_cache(maxsize=1)
def _loaded(folder: str, changed: int) -> tuple[dict[str, Any], Encoder]:
    # a worker has one core; the backend reads this at its first call
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    manifest = read_manifest(folder)
    backend = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    return manifest, Encoder(backend, **manifest["encoder"])


class _Writer:
    """Writes one Arrow file of a shard: kept rows in their order, then the others.

    Without rows there is no file.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self._part, self._schema = path, part_of(path), SCHEMAS[kind]
        self._waiting: list[dict[str, Any]] = []
        self._dropped: list[dict[str, Any]] = []
        self._items = self._rows = self._kept = 0
        self._stream: pa.RecordBatchStreamWriter | None = None

    def add(self, row: dict[str, Any], kept: bool) -> None:
        """Add a row, and write the gathered rows when there are enough.

        Those that are not kept come last.
        """
        if not kept:
            self._dropped.append(row)
            return
        self._kept += 1
        self._gather(row)

    def close(self) -> dict[str, Any] | None:
        """Finish the file and move it into place. Returns its rows, bytes and hash."""
        for row in self._dropped:
            self._gather(row)
        self._write()
        if self._stream is None:
            return None
        self._stream.close()
        self._sink.close()
        with self._part.open("rb+") as file:
            os.fsync(file.fileno())
        facts = {"rows": self._rows, "kept": self._kept, "bytes": self._part.stat().st_size}
        facts["sha256"] = file_hash(self._part)
        self._part.replace(self.path)
        return facts

    def _gather(self, row: dict[str, Any]) -> None:
        self._waiting.append(row)
        self._items += len(row["input_ids"] if "input_ids" in row else row["messages"])
        if len(self._waiting) >= ROWS_A_BATCH or self._items >= ITEMS_A_BATCH:
            self._write()

    def _write(self) -> None:
        if not self._waiting:
            return
        if self._stream is None:
            self._sink = pa.OSFile(str(self._part), "wb")
            self._stream = pa.ipc.new_stream(self._sink, self._schema)
        columns = [
            _array([row[field.name] for row in self._waiting], field.type) for field in self._schema
        ]
        self._stream.write_batch(pa.record_batch(columns, schema=self._schema))
        self._rows += len(self._waiting)
        self._waiting, self._items = [], 0


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    if kind != pa.list_(pa.int32()):
        return pa.array(values, kind)
    # ten times as fast as pyarrow is with lists
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum([len(ids) for ids in values], out=offsets[1:])
    flat = np.fromiter(chain.from_iterable(values), np.int32, count=offsets[-1])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))
