"""What tokenizing a data set needs to know before any worker starts: shards, settings, encoder."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from sftlab.data.batch_encoder import Encoder
from sftlab.data.row_notes import unused_columns
from sftlab.data.shard_writer import convert_counting, place_of
from sftlab.data.sources import read_source
from sftlab.data.splits import Converter, is_typed
from sftlab.data.tokenized_dataset import backend_text, encoding_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sftlab.config.recipe import DataArguments, TrainingArguments

# rows that are converted and encoded beforehand, so that a mistake is found before workers start
PROBED_ROWS = 256
# fields of the recipe that decide which rows there are
_DATA_FIELDS = (
    "dataset_name",
    "dataset_config",
    "dataset_train_split",
    "dataset_fraction",
    "split_fractions",
)


def plan_shards(
    data: "DataArguments",
    training: "TrainingArguments",
    tokenizer: "PreTrainedTokenizerBase",
    rows_per_shard: int,
    max_bad_rows: float,
) -> tuple[list[bytes], dict[str, Any], str, dict[str, Any]]:
    """Read the data set, check its first rows, and cut it into shards.

    `tokenizer` has its chat template already. Returns where each shard's rows are, the settings
    that decide the tokens, the tokenizer's backend as JSON, and the encoder's template and special
    tokens. Raises ValueError for a stream, a data set in memory, and too many bad rows.
    """
    if data.dataset_streaming:
        raise ValueError(
            "a stream cannot be cut into shards: leave dataset_streaming out of the recipe"
        )
    settings = encoding_settings(tokenizer, training)
    rows, data_format = read_source(data)
    if not rows.cache_files:
        raise ValueError(
            f"{data.dataset_name} was read into memory: unset HF_DATASETS_IN_MEMORY_MAX_SIZE"
        )
    settings |= {name: getattr(data, name) for name in _DATA_FIELDS}
    settings |= {
        "dataset_shape": data_format,
        "rows": len(rows),
        "rows_per_shard": rows_per_shard,
        "source": _source_hash(data.dataset_name, rows),
        "columns_not_used": unused_columns(rows, data_format) if is_typed(rows) else {},
    }
    encoder = {
        "template": tokenizer.get_chat_template(),
        "special_tokens": tokenizer.special_tokens_map,
    }
    convert = Converter(data_format, tuple(data.split_fractions), data.dataset_name)
    _probe(rows, convert, tokenizer, encoder, max_bad_rows)
    places = [
        place_of(rows, start, min(start + rows_per_shard, len(rows)))
        for start in range(0, len(rows), rows_per_shard)
    ]
    return places, settings, backend_text(tokenizer), encoder


def refuse_bad_rows(counted: dict[str, Any], rows: int, share: float) -> None:
    """Raise ValueError where more than `share` of the rows are not text."""
    if counted["bad"] > share * rows:
        raise ValueError(
            f"{counted['first_bad']} ({counted['bad']} such rows so far, --max_bad_rows allows "
            f"{int(share * rows)} of {rows})"
        )


def _probe(
    rows: Dataset,
    convert: Converter,
    tokenizer: "PreTrainedTokenizerBase",
    encoder: dict[str, Any],
    max_bad_rows: float,
) -> None:
    """Convert and encode the first rows, with the encoder's shortcut and without it."""
    counted = {"bad": 0, "first_bad": None}
    first = convert_counting(convert, rows[:PROBED_ROWS], 0, counted)
    refuse_bad_rows(counted, len(rows), max_bad_rows)
    texts = first["prompt"], first["completion"]
    joined, plain = (
        list(Encoder(tokenizer.backend_tokenizer, **encoder, shortcut=shortcut)(*texts))
        for shortcut in (True, False)
    )
    assert joined == plain, "the encoder's shortcut does not hold for this tokenizer"


def _source_hash(name: str, rows: Dataset) -> str:
    """Returns the SHA-256 of a local file, or the fingerprint that `datasets` gives to hub rows."""
    if not Path(name).is_file():
        return rows._fingerprint
    with Path(name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
