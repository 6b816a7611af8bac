"""Rows that a model cannot take: ids beyond its embedding, and more tokens than its positions."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from sftlab.data.template_errors import TEMPLATE_ERRORS, is_of_template
from sftlab.data.template_facts import PROBES

_ROWS_AT_ONCE = 10_000


def refuse_unknown_tokens(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Raise ValueError where padding or the chat template takes tokens beyond the embedding."""
    size = _embeddings(config)
    if size is None:
        return
    question = PROBES["a question"]
    try:
        text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    except TEMPLATE_ERRORS as error:
        if not is_of_template(error):
            raise
        text = ""  # whether a real row is refused is found out row by row
    used = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}
    used |= set(tokenizer(text, add_special_tokens=False)["input_ids"])
    beyond = sorted(i for i in used if i is not None and i >= size)
    if beyond:
        names = ", ".join(
            f"{tokenizer.convert_ids_to_tokens(i)!r:.60} (id {i})" for i in beyond[:3]
        )
        raise ValueError(
            f"the tokenizer's {names} is beyond the model's {size} embeddings: take pad_token and "
            "eos_token among the tokens that the model knows, or a model whose embedding was "
            "resized and saved with this tokenizer"
        )


def refuse_beyond_model(
    rows: Dataset, split: str, config: PreTrainedConfig, max_length: int | None
) -> None:
    """Raise ValueError for encoded rows that the model cannot take.

    `rows` have the column input_ids, cut to `max_length` already.
    """
    size, positions = _embeddings(config), positions_of(config)
    first, long = 0, 0
    for ids in _batches(rows):
        if (
            size is not None
            and len(ids)
            and (largest := pc.max(pc.list_flatten(ids)).as_py() or 0) >= size
        ):
            row = next(n for n, one in enumerate(ids) if max(one.as_py(), default=0) >= size)
            raise ValueError(
                f"{split} row {first + row} holds the token id {largest}, and the model has "
                f"{size} embeddings: its tokenizer belongs to another model, or tokens were added "
                "without resizing the embedding"
            )
        if positions is not None:
            long += pc.sum(pc.greater(pc.list_value_length(ids), positions)).as_py() or 0
        first += len(ids)
    if long:
        raise ValueError(
            f"{long:,} {split} rows are longer than the model's {positions} positions "
            f"(max_length is {max_length}): pass --max_length {positions} or less"
        )


def refuse_long_stream(config: PreTrainedConfig, max_length: int | None) -> None:
    """Raise ValueError where rows of a stream could be longer than the model's positions."""
    positions = positions_of(config)
    if positions is not None and (max_length is None or max_length > positions):
        raise ValueError(
            f"max_length is {max_length} and the model has {positions} positions: pass "
            f"--max_length {positions} or less, because a stream's longest row is not known"
        )


def _batches(rows: Dataset) -> Iterator[pa.ChunkedArray]:
    for batch in rows.with_format("arrow").iter(_ROWS_AT_ONCE):
        yield batch["input_ids"]


def _embeddings(config: PreTrainedConfig) -> int | None:
    return getattr(config.get_text_config(), "vocab_size", None)


def positions_of(config: PreTrainedConfig) -> int | None:
    """Returns the most tokens that a model takes; None where its config does not say."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None
