"""A tokenized data set on disk: Arrow shards, and a manifest that says what they were made from.

NAME/
  manifest.json           settings that decide the ids, facts, and each shard's rows, sizes, SHA-256
  tokenizer.json          the tokenizer's backend, for workers
  shard-00000.json        a shard's record, written last; without it the shard does not count
  train-00000.arrow       input_ids, prompt_length (tokens out of the loss), opening
  validation-00000.arrow  the same, with prompt and completion as text
  test-00000.arrow        prompt and completion as text, which the evaluations encode
  rows-00000.arrow        for each row, in order: split, row_hash, tokens before truncation, kept

A shard is a range of the source's rows. In its files the rows that training uses come first, in
order. Rows without a response token within max_length, which trl drops, come after them.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from sftlab.data.shard_schema import check_manifest, check_record
from sftlab.data.template_facts import rendered_facts
from sftlab.files import file_hash
from sftlab.schema import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sftlab.config.recipe import DataArguments, TrainingArguments

SPLITS = ("train", "validation", "test")
FORMAT = 1
MANIFEST = "manifest.json"
_IDS = [
    ("input_ids", pa.list_(pa.int32())),
    ("prompt_length", pa.int32()),
    ("opening", pa.uint64()),
]
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_TEXT = [("prompt", _MESSAGES), ("completion", _MESSAGES)]
_ROWS = [
    ("split", pa.int8()),
    ("row_hash", pa.string()),
    ("tokens", pa.int32()),
    ("kept", pa.bool_()),
]
SCHEMAS = {
    "train": pa.schema(_IDS),
    "validation": pa.schema(_IDS + _TEXT),
    "test": pa.schema(_TEXT),
    "rows": pa.schema(_ROWS),
}
# settings that `open_tokens` compares, and words for the other settings
_OF_THE_DATA = ("dataset_config", "dataset_train_split", "dataset_fraction", "split_fractions")
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
            f"{path} is not the manifest of a tokenized data set of format {FORMAT}: tokenize again"
        )
    check_manifest(manifest, str(path))
    return manifest


def encoding_settings(
    tokenizer: "PreTrainedTokenizerBase", training: "TrainingArguments"
) -> dict[str, Any]:
    """Returns the settings that decide a row's ids and mask.

    Raises ValueError for a tokenizer without a fast backend, and for a mask other than the
    completion's.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer: give sft.py the data set itself, "
            "which it tokenizes while it trains"
        )
    if training.assistant_only_loss:
        raise ValueError("assistant_only_loss needs the text: give sft.py the data set itself")
    template = tokenizer.get_chat_template()
    settings = {
        "template": _hash(template),
        "tokenizer": _hash(
            json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str),
            backend_text(tokenizer),
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


def open_tokens(
    args: "DataArguments",
) -> tuple[Dataset, Dataset, Dataset, dict[str, Any], dict[str, Any]]:
    """Open train, validation and test, memory-mapped from their shards.

    Returns them with the facts of their text and the manifest. Raises ValueError for an unfinished
    or damaged data set, and for other rows or splits than `args` says.
    """
    folder = Path(str(args.dataset_name))
    manifest = read_manifest(folder) | {"folder": str(folder)}
    wanted = {name: getattr(args, name) for name in _OF_THE_DATA}
    wanted |= {"dataset_shape": args.dataset_shape} if args.dataset_shape else {}
    if args.dataset_streaming:
        raise ValueError(f"{folder} is tokenized: leave dataset_streaming out of the recipe")
    if manifest["facts"] is None:
        raise ValueError(
            f"{folder} is not finished: start slurm/tokenize_dataset.py again with the same options"
        )
    if found := difference(manifest["settings"], wanted):
        raise ValueError(
            f"{folder} was made with {found}: tokenize again into another folder, or train on "
            f"{manifest['settings']['dataset_name']} itself"
        )
    for shard in manifest["shards"]:
        for name, file in shard["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != file["bytes"]:
                raise ValueError(
                    f"{path} is missing or damaged: start slurm/tokenize_dataset.py again with the "
                    "same options"
                )
    parts = [_open_split(folder, manifest, name) for name in SPLITS]
    return *parts, manifest["facts"], manifest


def _open_split(folder: Path, manifest: Mapping[str, Any], split: str) -> Dataset:
    kept, dropped = [], []
    for shard in manifest["shards"]:
        name = file_name(split, shard["number"])
        if name in shard["files"]:
            rows, whole = shard["files"][name], Dataset.from_file(str(folder / name))
            for parts, part in (
                (kept, range(rows["kept"])),
                (dropped, range(rows["kept"], rows["rows"])),
            ):
                parts += [whole.select(part)] if part else []
    parts = kept + dropped
    return (
        concatenate_datasets(parts)
        if parts
        else Dataset.from_dict({n: [] for n in SCHEMAS[split].names})
    )


class WithLabels:
    """Turns tokenized rows into `input_ids` and `labels`, which are -100 on the prompt."""

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        labels = [
            [-100] * n + ids[n:]
            for ids, n in zip(batch["input_ids"], batch["prompt_length"], strict=True)
        ]
        return {"input_ids": batch["input_ids"], "labels": labels}


def training_rows(
    rows: Dataset, manifest: Mapping[str, Any], split: str, seed: int | None = None
) -> Dataset:
    """Returns the rows of a split that trl would train on.

    With a `seed` they are shuffled as `shuffle_dataset` does it.
    """
    kept = rows.select(range(manifest["tokenized"][split]["kept"]))
    kept = kept if seed is None else kept.shuffle(seed=seed)
    return kept.select_columns(["input_ids", "prompt_length"]).with_transform(WithLabels())


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
