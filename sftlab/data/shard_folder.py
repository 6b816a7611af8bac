"""The folder of a tokenized data set: begun, continued after an interruption, and finished."""

import hashlib
import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sftlab.data.row_notes import count_notes
from sftlab.data.sequence_facts import count, count_sources
from sftlab.data.shard_order import flat, ordered_rows, row_lists
from sftlab.data.source_facts import dropped_facts, refuse_empty, source_facts
from sftlab.data.tokenized_dataset import (
    FORMAT,
    MANIFEST,
    SPLITS,
    difference,
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
    tables, before, left_out = ordered_rows(folder, settings, records)
    split_of = _splits_of(folder, records)
    facts = {
        "dataset": settings["dataset_name"],
        "shape": settings["dataset_shape"],
        "rows_there": sum(source["rows_there"] for source in settings["sources"]),
        "rows_read": settings["rows"],
        **dropped_facts(split_of, list(chain.from_iterable(r["without_turn"] for r in records))),
        **count_notes(chain.from_iterable(record["notes"].items() for record in records)),
        **left_out,
    }
    facts |= {"columns": settings["columns_read"]} if settings["columns_read"] else {}
    facts["not_used"] |= settings["columns_not_used"]
    for name, table in tables.items():
        own = next((s["reader"]["name"] for s in settings["sources"] if s["split"] == name), None)
        shares, keys = (
            settings["split_fractions"],
            [t["opening"].to_numpy() for t in tables.values()],
        )
        refuse_empty(len(table), name, settings["dataset_name"], shares, keys, facts, own)
        facts[name] = {"rows": len(table), "fingerprint": _fingerprint(table)}
    if len(settings["sources"]) > 1:
        numbers = [table["source"].to_numpy() for table in tables.values()]
        facts["sources"] = source_facts(settings["sources"], numbers, before)
    if bad := sum(record["bad"] for record in records):
        facts["bad_rows_left_out"] = bad
    lengths = {name: flat(tables[name], "tokens") for name in SPLITS[:2]}
    tokenized = {name: _counted(tables[name], settings) for name in SPLITS[:2]}
    tokenized["test"] = {"kept": len(tables["test"])}
    manifest["control_marks"] = sum(record["control_marks"] for record in records)
    manifest |= {"facts": facts, "tokenized": tokenized, "shards": records}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return {name: lengths[name][flat(tables[name], "loss_kept") > 0] for name in SPLITS[:2]}


def _counted(table: pa.Table, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what became of the sequences of a split, in all and of each of several sources."""
    tokens, loss_tokens, loss_kept, part = (
        flat(table, name) for name in ("tokens", "loss_tokens", "loss_kept", "part")
    )
    counted = count(tokens, loss_tokens, loss_kept, part, settings["max_length"])
    divided = sum(source["split"] is None for source in settings["sources"])
    if divided == 1:
        return counted
    sequences = pc.list_value_length(table["tokens"]).to_numpy()
    source = np.repeat(table["source"].to_numpy(), sequences)
    return counted | count_sources(source, tokens, loss_kept, divided, settings["max_length"])


def _splits_of(folder: Path, records: list[dict[str, Any]]) -> np.ndarray:
    tables = row_lists(folder, records)
    return np.concatenate([np.zeros(0, np.int8), *(table["split"].to_numpy() for table in tables)])


def _fingerprint(table: pa.Table) -> str:
    digest = hashlib.sha256()
    for batch in table.select(["row_hash"]).to_batches():
        digest.update("".join(batch["row_hash"].to_pylist()).encode())
    return digest.hexdigest()[:16]


def _remove_parts(folder: Path) -> None:
    for left in folder.glob(".*.part"):
        left.unlink()
