"""Rows of a data set become the shards of a tokenized one:

what a worker does, and how its shards are put together.
"""

import hashlib
import json
import os
import pickle
from collections.abc import Iterator, Mapping
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
from sftlab.data.splits import Converter, opening_key, refuse_empty
from sftlab.data.tokenized_dataset import (
    FORMAT,
    MANIFEST,
    SCHEMAS,
    SPLITS,
    difference,
    file_hash,
    file_name,
    read_manifest,
    read_record,
    record_path,
)
from sftlab.files import part_of, write_text

# Rows of the source that are converted and encoded together, and what is gathered before it is
# written.
ROWS_AT_ONCE = 128
ROWS_A_BATCH = 1000
ITEMS_A_BATCH = 1_000_000


def begin(
    folder: Path, settings: Mapping[str, Any], backend: str, encoder: Mapping[str, Any]
) -> dict[str, Any]:
    """Make the folder of a tokenized data set, or go on in one that was made with the same
    settings; its manifest.

    `backend` is the tokenizer's JSON, `encoder` the template and the special tokens. Raises
    ValueError for a folder with other contents or other settings, and leaves it as it is.
    """
    settings = json.loads(json.dumps(dict(settings)))
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        if found := difference(manifest["settings"], settings):
            raise ValueError(
                f"{folder} holds shards made with {found}: give another --out, or remove it"
            )
        return manifest
    ours = ("tokenizer.json", ".part")  # all that there is where making the folder was interrupted
    if folder.exists() and not (
        folder.is_dir() and all(path.name.endswith(ours) for path in folder.iterdir())
    ):
        raise ValueError(
            f"{folder} is there already and is no tokenized data set: give another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tokenizer.json", backend)
    manifest = {
        "format": FORMAT,
        "settings": settings,
        "encoder": dict(encoder),
        "facts": None,
        "shards": [],
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def place_of(rows: Dataset, start: int, stop: int) -> bytes:
    """Files and range of some of the memory-mapped rows, to be sent to a worker.

    As bytes, for the scheduler would otherwise map the files anew for every task that it keeps.
    """
    return pickle.dumps(rows.select(range(start, stop)))


def tokenize_shard(folder: str, number: int, place: bytes, first: int) -> dict[str, Any]:
    """Convert, encode and write the rows at `place` as one shard, `first` being the number of the
    first; its record.

    The bytes depend on the rows and the manifest alone. Rows that are not text are left out and
    counted.
    """
    rows = pickle.loads(place)
    manifest, encoder = _loaded(folder, (Path(folder) / MANIFEST).stat().st_mtime_ns)
    settings = manifest["settings"]
    if settings.get("day", date.today().isoformat()) != date.today().isoformat():
        raise ValueError(
            f"the template writes the date, and {settings['day']} is over: tokenize into another "
            "folder"
        )
    convert = Converter(
        settings["dataset_shape"], tuple(settings["split_fractions"]), settings["dataset_name"]
    )
    record: dict[str, Any] = {
        "number": number,
        "source_rows": len(rows),
        "bad": 0,
        "first_bad": None,
    }
    writers = {kind: _Writer(Path(folder) / file_name(kind, number), kind) for kind in SCHEMAS}
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = rows[start : start + ROWS_AT_ONCE]
        converted = convert_counting(convert, batch, first + start, record)
        _encode(converted, encoder, settings, writers)
    record["files"] = {
        writer.path.name: facts for writer in writers.values() if (facts := writer.close())
    }
    write_text(record_path(folder, number), json.dumps(record) + "\n")
    return record


def convert_counting(
    convert: Converter, batch: dict[str, list], first: int, record: dict[str, Any]
) -> dict[str, list]:
    """`convert` of a batch without its rows that are not text, which `record` counts ('bad',
    'first_bad').
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
    return found or {name: [] for name in ("prompt", "completion", "split", "row_hash")}


def _encode(
    rows: dict[str, list],
    encoder: Encoder,
    settings: Mapping[str, Any],
    writers: Mapping[str, "_Writer"],
) -> None:
    limit, at_end = settings["max_length"], settings["truncation_mode"] == "keep_end"
    trained = [i for i, split in enumerate(rows["split"]) if split in (0, 1)]
    encoded = encoder(
        [rows["prompt"][i] for i in trained], [rows["completion"][i] for i in trained]
    )
    for index, split in enumerate(rows["split"]):
        row = {name: rows[name][index] for name in ("prompt", "completion", "row_hash")}
        row |= {"split": split, "tokens": None, "kept": split == 2}
        if split in (0, 1):
            ids, masked = next(encoded)
            masked = masked if settings["completion_only_loss"] else 0
            row["tokens"] = len(ids)
            if limit is not None and len(ids) > limit:
                masked = max(0, masked - (len(ids) - limit)) if at_end else min(masked, limit)
                ids = ids[-limit:] if at_end else ids[:limit]
            # trl looks for a token in the loss only after it has truncated
            row["kept"] = limit is None or masked < len(ids)
            row |= {
                "input_ids": ids,
                "prompt_length": masked,
                "opening": opening_key(row["prompt"]),
            }
        writers["rows"].add(row)
        if split >= 0:
            writers[SPLITS[split]].add(row)


@lru_cache(maxsize=1)
def _loaded(folder: str, changed: int) -> tuple[dict[str, Any], Encoder]:
    # a worker is one core; set before the first call, for the backend reads it then
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    manifest = read_manifest(folder)
    backend = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    return manifest, Encoder(backend, **manifest["encoder"])


class _Writer:
    """One Arrow file of a shard: rows that are kept in their order, then the others.

    Without rows there is no file.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self._part, self._schema = path, part_of(path), SCHEMAS[kind]
        self._in_order = "kept" in self._schema.names
        self._waiting: list[dict[str, Any]] = []
        self._dropped: list[dict[str, Any]] = []
        self._items = self._rows = self._kept = 0
        self._stream: pa.RecordBatchStreamWriter | None = None

    def add(self, row: dict[str, Any]) -> None:
        """Take a row, and write what was gathered when it is much."""
        if not row["kept"] and not self._in_order:
            self._dropped.append(row)
            return
        self._kept += 1
        self._gather(row)

    def close(self) -> dict[str, Any] | None:
        """Finish the file and put it in its place; its rows, bytes and hash."""
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
        self._items += row["tokens"] or len(row["completion"][0]["content"])
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
    # a tenth of the time that pyarrow takes over lists
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum([len(ids) for ids in values], out=offsets[1:])
    flat = np.fromiter(chain.from_iterable(values), np.int32, count=offsets[-1])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def finish(
    folder: Path, manifest: dict[str, Any], records: list[dict[str, Any]]
) -> dict[str, np.ndarray]:
    """Put facts and shards into the manifest.

    Tokens of the rows that training uses, before truncation, by split.

    The facts are those that `load_splits` finds in the text; like it this raises ValueError for an
    empty split.
    """
    _remove_parts(folder)
    settings = manifest["settings"]
    digests = {name: hashlib.sha256() for name in SPLITS}
    rows, lengths, tokenized = dict.fromkeys(SPLITS, 0), {name: [] for name in SPLITS[:2]}, {}
    dropped = 0
    for table in _row_lists(folder, records):
        split = table["split"].to_numpy()
        hashes = table["row_hash"].to_numpy(zero_copy_only=False)
        dropped += int((split < 0).sum())
        for index, name in enumerate(SPLITS):
            rows[name] += int((split == index).sum())
            digests[name].update("".join(hashes[split == index]).encode())
        for index, name in enumerate(SPLITS[:2]):
            used = table.filter((split == index) & table["kept"].to_numpy())
            lengths[name].append(used["tokens"].to_numpy())
    for name in SPLITS:
        refuse_empty(
            rows[name],
            name,
            settings["dataset_name"],
            settings["split_fractions"],
            sum(rows.values()),
        )
    facts = {"dataset": settings["dataset_name"], "shape": settings["dataset_shape"]}
    facts |= {"rows_read": settings["rows"], "empty_responses_dropped": dropped}
    facts |= {
        name: {"rows": rows[name], "fingerprint": digests[name].hexdigest()[:16]} for name in SPLITS
    }
    if bad := sum(record["bad"] for record in records):
        facts["bad_rows_left_out"] = bad
    found = {
        name: np.concatenate(parts) if parts else np.zeros(0, np.int32)
        for name, parts in lengths.items()
    }
    limit = settings["max_length"] or np.iinfo(np.int32).max
    for name, tokens in found.items():
        tokenized[name] = {
            "kept": len(tokens),
            "dropped": rows[name] - len(tokens),
            "cut": int((tokens > limit).sum()),
            "tokens": int(np.minimum(tokens, limit).sum()),
        }
    tokenized["test"] = {"kept": rows["test"]}
    manifest |= {"facts": facts, "tokenized": tokenized, "shards": records}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return found


def _remove_parts(folder: Path) -> None:
    for left in folder.glob(".*.part"):
        left.unlink()


def _row_lists(folder: Path, records: list[dict[str, Any]]) -> Iterator[pa.Table]:
    for record in records:
        name = file_name("rows", record["number"])
        if name in record["files"]:
            with pa.OSFile(str(folder / name)) as file:
                yield pa.ipc.open_stream(file).read_all()


def finished_records(folder: Path, shards: int) -> dict[int, dict[str, Any]]:
    """The records of the shards that are there and whole.

    What a killed worker left of another is removed.
    """
    _remove_parts(folder)
    found = ((number, read_record(folder, number)) for number in range(shards))
    return {number: record for number, record in found if record}
