"""The folder of a tokenized data set: begun, continued after an interruption, and finished."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sftlab.data.row_notes import count_notes
from sftlab.data.sequence_facts import joined
from sftlab.data.splits import dropped_facts, refuse_empty
from sftlab.data.tokenized_dataset import (
    FORMAT,
    MANIFEST,
    SPLITS,
    difference,
    file_name,
    read_manifest,
    read_record,
)
from sftlab.files import write_text


def begin(
    folder: Path, settings: Mapping[str, Any], backend: str, encoder: Mapping[str, Any]
) -> dict[str, Any]:
    """Make the folder of a tokenized data set, or go on in one with the same settings.

    `backend` is the tokenizer's JSON, `encoder` the template and the special tokens. Returns the
    manifest. Raises ValueError for a folder with other contents or other settings, which is left
    as it is.
    """
    settings = json.loads(json.dumps(dict(settings)))
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        if found := difference(manifest["settings"], settings):
            raise ValueError(
                f"{folder} holds shards made with {found}: give another --out, or remove it"
            )
        if manifest["encoder"] != json.loads(json.dumps(dict(encoder))):
            raise ValueError(
                f"{folder / MANIFEST}: encoder is not what its settings are a hash of: remove the "
                "folder, or give another --out"
            )
        copy = folder / "tokenizer.json"
        if not copy.is_file() or copy.read_text(encoding="utf-8", errors="replace") != backend:
            write_text(copy, backend)
        return manifest
    ours = ("tokenizer.json", ".part")  # left where making the folder was interrupted
    if folder.exists() and not (
        folder.is_dir() and all(path.name.endswith(ours) for path in folder.iterdir())
    ):
        raise ValueError(f"{folder} exists and is no tokenized data set: give another --out")
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


def finished_records(folder: Path, shards: int) -> dict[int, dict[str, Any]]:
    """Returns the records of the shards that are whole, by number.

    The unfinished files of killed workers are removed.
    """
    _remove_parts(folder)
    found = ((number, read_record(folder, number)) for number in range(shards))
    return {number: record for number, record in found if record}


def finish(
    folder: Path, manifest: dict[str, Any], records: list[dict[str, Any]]
) -> dict[str, np.ndarray]:
    """Add facts and shards to the manifest.

    Returns the lengths of the rows that training uses, in tokens before truncation, by split. The
    facts are those that `load_splits` finds in the text. Raises ValueError for an empty split.
    """
    _remove_parts(folder)
    settings = manifest["settings"]
    counted = _count(folder, records)
    rows = counted.rows
    for name in SPLITS:
        total = sum(rows.values())
        refuse_empty(rows[name], name, settings["dataset_name"], settings["split_fractions"], total)
    facts = {
        "dataset": settings["dataset_name"],
        "shape": settings["dataset_shape"],
        "rows_there": settings["rows_there"],
        "rows_read": settings["rows"],
        **dropped_facts(
            counted.unused, list(chain.from_iterable(r["without_turn"] for r in records))
        ),
        **count_notes(chain.from_iterable(record["notes"].items() for record in records)),
    }
    facts["not_used"] |= settings["columns_not_used"]
    facts |= {
        name: {"rows": rows[name], "fingerprint": counted.fingerprints[name]} for name in SPLITS
    }
    if bad := sum(record["bad"] for record in records):
        facts["bad_rows_left_out"] = bad
    tokenized: dict[str, dict[str, int]] = {
        name: joined(record["tokenized"][name] for record in records) for name in SPLITS[:2]
    }
    tokenized["test"] = {"kept": rows["test"]}
    manifest["control_marks"] = sum(record["control_marks"] for record in records)
    manifest |= {"facts": facts, "tokenized": tokenized, "shards": records}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return counted.lengths


class _Counted(NamedTuple):
    """Rows and their fingerprint by split, lengths of kept rows, and `split` of rows in none."""

    rows: dict[str, int]
    fingerprints: dict[str, str]
    lengths: dict[str, np.ndarray]
    unused: np.ndarray


def _count(folder: Path, records: list[dict[str, Any]]) -> _Counted:
    digests = {name: hashlib.sha256() for name in SPLITS}
    rows = dict.fromkeys(SPLITS, 0)
    lengths: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS[:2]}
    unused = [np.zeros(0, np.int8)]
    for table in _row_lists(folder, records):
        split = table["split"].to_numpy()
        hashes = table["row_hash"].to_numpy(zero_copy_only=False)
        unused.append(split[split < 0])
        for index, name in enumerate(SPLITS):
            rows[name] += int((split == index).sum())
            digests[name].update("".join(hashes[split == index]).encode())
        for index, name in enumerate(SPLITS[:2]):
            used = table.filter(split == index)
            tokens, kept = (pc.list_flatten(used[column]) for column in ("tokens", "kept"))
            lengths[name].append(tokens.filter(kept).to_numpy())
    return _Counted(
        rows,
        {name: digest.hexdigest()[:16] for name, digest in digests.items()},
        {
            name: np.concatenate(parts) if parts else np.zeros(0, np.int32)
            for name, parts in lengths.items()
        },
        np.concatenate(unused),
    )


def _remove_parts(folder: Path) -> None:
    for left in folder.glob(".*.part"):
        left.unlink()


def _row_lists(folder: Path, records: list[dict[str, Any]]) -> Iterator[pa.Table]:
    for record in records:
        name = file_name("rows", record["number"])
        if name in record["files"]:
            with pa.OSFile(str(folder / name)) as file:
                yield pa.ipc.open_stream(file).read_all()
