"""What tokenizing a data set needs to know before any worker starts: shards, settings, encoder."""

import hashlib
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftlab.data.batch_encoder import Encoder
from sftlab.data.converter import Converter
from sftlab.data.loss_check import ROWS_LOOKED_AT, look_at_loss
from sftlab.data.model_limits import positions_of, refuse_unknown_tokens
from sftlab.data.open_tokens import ALWAYS, WHERE_SET
from sftlab.data.row_notes import count_notes, fields_of, unwritten
from sftlab.data.shard_writer import conversations, convert_counting, place_of, refuse_rendering
from sftlab.data.source_facts import not_used_of, shape_facts
from sftlab.data.sources import Source, read_sources, settings_of
from sftlab.data.template_errors import TEMPLATE_ERRORS, is_of_template, rendering_limit
from sftlab.data.template_facts import fields_written
from sftlab.data.tokenized_dataset import backend_text, encoding_settings
from sftlab.exit_messages import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from sftlab.config.recipe import DataArguments, TrainingArguments

# rows that are converted and encoded beforehand, so that a mistake is found before workers start
PROBED_ROWS = 256


def plan_shards(
    data: "DataArguments",
    training: "TrainingArguments",
    tokenizer: "PreTrainedTokenizerBase",
    rows_per_shard: int,
    max_bad_rows: float,
    config: "PreTrainedConfig | None" = None,
) -> tuple[list[bytes], dict[str, Any], str, dict[str, Any]]:
    """Read the data set, check its first rows, and cut it into shards.

    `tokenizer` has its chat template already. With the model's `config`, tokens that the model does
    not know are refused. Returns where each shard's rows are, the settings
    that decide the tokens, the tokenizer's backend as JSON, and the encoder's template and special
    tokens. Raises ValueError for a stream, a data set in memory, too many bad rows, and a template
    whose loss would not be the answers alone.
    """
    if data.dataset_streaming:
        raise ValueError(
            "a stream cannot be cut into shards: leave dataset_streaming out of the recipe"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer: give sft.py the data set itself, "
            "which it tokenizes before it trains"
        )
    settings = encoding_settings(tokenizer, training)
    sources = read_sources(data)
    if not all(source.rows.cache_files for source in sources):
        raise ValueError(
            f"{data.dataset_name} was read into memory: unset HF_DATASETS_IN_MEMORY_MAX_SIZE"
        )
    settings |= _row_settings(data, sources) | {"rows_per_shard": rows_per_shard}
    encoder = {
        "template": tokenizer.get_chat_template(),
        "special_tokens": tokenizer.special_tokens_map,
    }
    first = [
        _probe(source, number, data.loss_on, tokenizer, encoder, max_bad_rows)
        for number, source in enumerate(sources)
    ]
    settings["loss_warnings"] = _look(tokenizer, first, settings["completion_only_loss"], config)
    settings["embeddings"] = config and config.get_text_config().vocab_size
    most = config and positions_of(config)
    if most and (training.max_length is None or training.max_length > most):
        settings["positions"] = most
    places = [
        place_of(source.rows, start, min(start + rows_per_shard, len(source.rows)), number)
        for number, source in enumerate(sources)
        for start in range(0, len(source.rows), rows_per_shard)
    ]
    return places, settings, backend_text(tokenizer), encoder


def _row_settings(data: "DataArguments", sources: list[Source]) -> dict[str, Any]:
    """Returns the settings that decide which rows there are and how they are read."""
    shapes = shape_facts(sources)
    return {name: getattr(data, name) for name in (*ALWAYS, *WHERE_SET)} | {
        "dataset_name": data.dataset_name,
        "dataset_shape": shapes["shape"],
        "datasets_stopping_strategy": data.datasets_stopping_strategy,
        "rows": sum(len(source.rows) for source in sources),
        "source": ", ".join(map(_source_hash, sources)),
        "sources": [settings_of(source) for source in sources],
        "columns_not_used": not_used_of(sources),
        "columns_read": shapes.get("columns", {}),
    }


def refuse_bad_rows(counted: dict[str, Any], rows: int, share: float) -> None:
    """Raise ValueError where more than `share` of the rows are not text."""
    if counted["bad"] > share * rows:
        raise ValueError(
            f"{counted['first_bad']} ({counted['bad']} such rows so far, --max_bad_rows allows "
            f"{int(share * rows)} of {rows})"
        )


def _probe(
    source: Source,
    number: int,
    loss_on: str,
    tokenizer: "PreTrainedTokenizerBase",
    encoder: dict[str, Any],
    max_bad_rows: float,
) -> dict[str, list]:
    """Convert and encode the first rows, with the encoder's shortcut and without it.

    Returns them converted.
    """
    rows, convert = source.rows, Converter(source.reader, source.fractions, loss_on, number)
    counted = {"bad": 0, "first_bad": None}
    first = convert_counting(convert, rows[:PROBED_ROWS], 0, counted)
    refuse_bad_rows(counted, len(rows), max_bad_rows)
    texts = [one for _, one in conversations(first)]
    try:
        with rendering_limit("some rows"):
            Encoder(tokenizer.backend_tokenizer, **encoder).refuse(texts)
    except TEMPLATE_ERRORS as error:
        if not is_of_template(error):
            raise
        plain = Encoder(tokenizer.backend_tokenizer, **encoder, shortcut=False)
        refuse_rendering(rows[:PROBED_ROWS], 0, convert, plain)
        raise ValueError(f"the chat template refuses a question: {first_line(error)}") from error
    joined, plain = (
        list(Encoder(tokenizer.backend_tokenizer, **encoder, shortcut=shortcut)(texts))
        for shortcut in (True, False)
    )
    assert joined == plain, "the encoder's shortcut does not hold for this tokenizer"
    return first


def _look(
    tokenizer: "PreTrainedTokenizerBase",
    converted: list[dict[str, list]],
    masked: bool,
    config: "PreTrainedConfig | None",
) -> list[str]:
    """Returns what is to be said about the loss under this template."""
    if config is not None:
        refuse_unknown_tokens(tokenizer, config)
    if not masked:
        return []
    train = []
    for first in converted:
        train += [one for split, one in conversations(first) if split == 0][:ROWS_LOOKED_AT]
    ends = None if config is None else config.get_text_config().eos_token_id
    noted = chain.from_iterable(first["notes"] for first in converted)
    with_ = count_notes((notes, 1) for notes in noted)["rows_with"]
    missing, _ = unwritten(with_, fields_written(tokenizer, fields_of(with_)))
    return look_at_loss(tokenizer, train, with_, ends) + missing


def _source_hash(source: Source) -> str:
    """Returns the SHA-256 of local files, or the fingerprint that `datasets` gives to hub rows."""
    files = source.reader.files or (source.reader.name,)
    if not all(Path(file).is_file() for file in files):
        return source.rows._fingerprint
    digests = []
    for path in files:
        with Path(path).open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest()[:16])
    return " ".join(digests)
