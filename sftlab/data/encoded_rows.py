"""Conversations of a split become the sequences that the trainer gets."""

import json
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import global_then_local_main_first

from sftlab.config.recipe import TrainingArguments
from sftlab.data.batch_encoder import Encoder
from sftlab.data.chat_template import encoder_of
from sftlab.data.converter import MOST_ROWS
from sftlab.data.messages import Conversation
from sftlab.data.sequence_facts import count, count_sources, cut_sequences
from sftlab.data.splits import Splits
from sftlab.data.token_sequence import TokenSequence, labels_of
from sftlab.data.tokenized_dataset import (
    FORMAT,
    WithLabels,
    encoding_settings,
    refuse_other_encoding,
    training_rows,
)

# rows that are encoded together
ROWS_AT_ONCE = 128
_COUNTED = ("tokens", "loss_tokens", "loss_kept", "part")
_IDS = List(Value("int32"))
FEATURES = Features(
    {"input_ids": _IDS, "spans": _IDS, **{name: Value("int32") for name in _COUNTED}}
)
STREAMED = Features({"input_ids": _IDS, "labels": _IDS, "source": Value("int32")})


class Encoded(NamedTuple):
    """Rows with `input_ids` and `labels`, and what `max_length` left of them; None of a stream."""

    rows: Dataset | IterableDataset
    facts: dict[str, int] | None


def conversations_of(batch: dict[str, list]) -> list[Conversation]:
    """Returns the converted rows of a batch of `datasets`' map."""
    rows = zip(*batch.values(), strict=True)
    return [Conversation.from_row(dict(zip(batch, values, strict=True))) for values in rows]


class _Encode:
    """Encodes batches of converted rows. It can be pickled."""

    def __init__(self, encoder: Encoder, settings: dict[str, Any], streamed: bool) -> None:
        self._encoder, self._settings, self._streamed = encoder, settings, streamed

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        made = list(self._encoder(conversations_of(batch)))
        if self._streamed:
            return self._streamed_rows(batch, made)
        cut = [one for sequences in made for one in cut_sequences(sequences, self._settings)]
        found = {"input_ids": [one.ids for one in cut], "spans": [one.spans for one in cut]}
        if "source" in batch:
            pairs = zip(batch["source"], made, strict=True)
            found["source"] = [number for number, sequences in pairs for _ in sequences]
        return found | {name: [getattr(one, name) for one in cut] for name in _COUNTED}

    def _streamed_rows(
        self, batch: dict[str, list], made: list[list[TokenSequence]]
    ) -> dict[str, list]:
        """Returns the rows that have a token in the loss. `source` is their data set's number."""
        rows: dict[str, list] = {name: [] for name in STREAMED}
        for conversation, sequences in zip(batch["conversation"], made, strict=True):
            for one in cut_sequences(sequences, self._settings):
                if one.loss_kept:
                    rows["input_ids"].append(one.ids)
                    rows["labels"].append(labels_of(one.ids, one.spans))
                    rows["source"].append(conversation // MOST_ROWS)
        return rows


def encode_splits(
    splits: Splits, tokenizer: PreTrainedTokenizerBase, training: TrainingArguments
) -> dict[str, Encoded]:
    """Returns the sequences of train and validation, made now or read from a tokenized data set.

    Raises ValueError for tokens of another template, tokenizer, length or mask.
    """
    rows = {"train": splits.train, "validation": splits.validation}
    if not splits.tokens:
        return {name: encode_rows(part, tokenizer, training, name) for name, part in rows.items()}
    refuse_other_encoding(splits.tokens, tokenizer, training)
    facts = splits.tokens["tokenized"]
    return {
        name: Encoded(training_rows(part, splits.tokens, name), facts[name])
        for name, part in rows.items()
    }


def encode_rows(
    rows: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    training: TrainingArguments,
    name: str,
) -> Encoded:
    """Encode the converted rows of a split; `name` is what the progress bar calls them.

    Sequences without a token in the loss within `max_length` are left out, as trl does. A process
    of several waits for the first one, and reads what that one has written.
    """
    settings = encoding_settings(tokenizer, training)
    if isinstance(rows, IterableDataset):
        encode = _Encode(encoder_of(tokenizer), settings, streamed=True)
        how = {"batch_size": ROWS_AT_ONCE, "remove_columns": rows.column_names}
        return Encoded(rows.map(encode, batched=True, features=STREAMED, **how), None)
    if not len(rows):  # `map` would give it no columns
        none = Dataset.from_dict({"input_ids": [], "spans": []}).with_transform(WithLabels())
        return Encoded(none, count(*[np.zeros(0, np.int64)] * len(_COUNTED), training.max_length))
    key = Hasher.hash([rows._fingerprint, json.dumps(settings), FORMAT])
    numbered = {"source": Value("int8")} if "source" in rows.column_names else {}
    with global_then_local_main_first():
        made = rows.map(
            _Encode(encoder_of(tokenizer), settings, streamed=False),
            batched=True,
            batch_size=ROWS_AT_ONCE,
            remove_columns=rows.column_names,
            features=Features({**FEATURES, **numbered}),
            num_proc=training.dataset_num_proc,
            new_fingerprint=key,
            desc=f"Encoding {name} rows",
        )
    counted = made.select_columns([*_COUNTED, *numbered]).with_format("numpy")[:]
    facts = count(*(counted[column] for column in _COUNTED), training.max_length)
    if numbered:
        source, columns = counted["source"], (counted["tokens"], counted["loss_kept"])
        facts |= count_sources(source, *columns, int(source.max()) + 1, training.max_length)
    if facts["dropped"]:
        made = made.select(np.flatnonzero(counted["loss_kept"] > 0))
    return Encoded(made.select_columns(["input_ids", "spans"]).with_transform(WithLabels()), facts)
