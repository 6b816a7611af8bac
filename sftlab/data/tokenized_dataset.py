"""A tokenized data set on disk: Arrow shards, and a manifest that says what they were made from.

NAME/
  manifest.json           settings that decide the ids, facts, and each shard's rows, sizes, SHA-256
  tokenizer.json          the tokenizer's backend, for workers
  shard-00000.json        a shard's record, written last; without it the shard does not count
  train-00000.arrow       input_ids, spans (start and length of each run of tokens in the loss),
                          opening
  validation-00000.arrow  the same
  test-00000.arrow        conversations as text, which the evaluations encode
  rows-00000.arrow        for each row, in order: split, row_hash, opening, and of each of its
                          sequences the tokens, those in the loss, those that are left of these, and
                          its number among the sequences of its conversation

A shard is a range of the rows of one source. In its files the sequences that training uses come
first, in order. Those without a token in the loss within max_length, which trl drops, come after
them.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from datasets import Dataset
from datasets.fingerprint import Hasher

from sftlab.data.shard_schema import check_manifest, check_record
from sftlab.data.template_facts import rendered_facts
from sftlab.data.token_sequence import labels_of
from sftlab.files import file_hash
from sftlab.schema import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sftlab.config.recipe import TrainingArguments

SPLITS = ("train", "validation", "test")
FORMAT = 2
MANIFEST = "manifest.json"
_LIST = pa.list_(pa.int32())
_IDS = [("input_ids", _LIST), ("spans", _LIST), ("opening", pa.int64())]
_TEXT = [
    ("messages", pa.string()),
    ("tools", pa.string()),
    ("answers", _LIST),
    ("opening", pa.int64()),
    ("conversation", pa.int64()),
]
_ROWS = [
    ("split", pa.int8()),
    ("row_hash", pa.string()),
    ("opening", pa.int64()),
    ("tokens", _LIST),
    ("loss_tokens", _LIST),
    ("loss_kept", _LIST),
    ("part", _LIST),
]
SCHEMAS = {
    "train": pa.schema(_IDS),
    "validation": pa.schema(_IDS),
    "test": pa.schema(_TEXT),
    "rows": pa.schema(_ROWS),
}
# words for settings
_WORDS = {
    "template": "another chat template (hash {})",
    "tokenizer": "another tokenizer (hash {})",
    "source": "other rows (hash {})",
    "day": "the date {} in its template",
    "rendered": "another rendering of its template (hash {})",
}


def is_tokenized(name: str | os.PathLike | None) -> bool:
    """Whether `name` is the folder of a tokenized data set, finished or not.

    A manifest that is no file counts, so that `read_manifest` says so.
    """
    return name is not None and (Path(name) / MANIFEST).exists()


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """Read the manifest of a folder. Raises ValueError where it cannot be read."""
    path = Path(folder) / MANIFEST
    manifest = read_object(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not the manifest of a tokenized data set of format {FORMAT} (its format is "
            f"{manifest.get('format')}): tokenize again into another folder"
        )
    check_manifest(manifest, str(path))
    return manifest


def encoding_settings(
    tokenizer: "PreTrainedTokenizerBase", training: "TrainingArguments"
) -> dict[str, Any]:
    """Returns the settings that decide a row's ids and mask."""
    template = tokenizer.get_chat_template()
    settings = {
        "template": _hash(template),
        "tokenizer": _hash(
            json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str),
            backend_text(tokenizer) if tokenizer.is_fast else Hasher.hash(tokenizer),
        ),
        "max_length": training.max_length,
        "truncation_mode": training.truncation_mode,
        "completion_only_loss": training.completion_only_loss is not False,
    }
    return settings | rendered_facts(tokenizer)


def backend_text(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Returns the fast backend as JSON, without padding and truncation set by earlier calls."""
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer.backend_tokenizer.to_str()


def difference(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Returns in words the first setting in which `made` differs from `wanted`, or None."""
    for name, value in json.loads(json.dumps(dict(wanted))).items():
        if made.get(name) != value:
            words = _WORDS.get(name, f"{name} {{}}")
            return f"{words.format(made.get(name))}, asked for is {value}"
    return None


def refuse_other_encoding(
    manifest: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase", training: "TrainingArguments"
) -> None:
    """Raise ValueError where template, tokenizer, length or mask are not the recipe's."""
    wanted = encoding_settings(tokenizer, training)
    if found := difference(manifest["settings"], wanted):
        raise ValueError(
            f"{manifest['folder']} was tokenized with {found}: tokenize again into another folder, "
            f"or train on {manifest['settings']['dataset_name']} itself"
        )


class WithLabels:
    """Turns tokenized rows into `input_ids` and `labels`, which are -100 out of the loss."""

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        labels = map(labels_of, batch["input_ids"], batch["spans"])
        return {"input_ids": batch["input_ids"], "labels": list(labels)}


def training_rows(rows: Dataset, manifest: Mapping[str, Any], split: str) -> Dataset:
    """Returns the rows of a split that trl would train on."""
    kept = rows.select(range(manifest["tokenized"][split]["kept"]))
    return kept.select_columns(["input_ids", "spans"]).with_transform(WithLabels())


def file_name(kind: str, number: int) -> str:
    """Returns the name of a shard's file. `kind` is a split, or rows."""
    return f"{kind}-{number:05d}.arrow"


def record_path(folder: str | os.PathLike, number: int) -> Path:
    """Returns the path of a shard's record."""
    return Path(folder) / f"shard-{number:05d}.json"


def read_record(folder: str | os.PathLike, number: int) -> dict[str, Any] | None:
    """Returns the record of a shard whose files all have their hashes.

    Returns None where the shard must be made, or made again.
    """
    path = record_path(folder, number)
    try:
        record = read_object(path)
        check_record(record, str(path))
        whole = record["number"] == number and all(
            _same(path.with_name(name), file) for name, file in record["files"].items()
        )
    except ValueError:
        return None
    return record if whole else None


def _same(path: Path, file: Mapping[str, Any]) -> bool:
    return path.is_file() and file_hash(path) == file["sha256"]


def _hash(*texts: str) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()[:16]
