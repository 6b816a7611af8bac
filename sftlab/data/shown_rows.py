"""Training rows encoded one by one, for people to look at."""

from collections.abc import Iterator
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from sftlab.config.recipe import TrainingArguments
from sftlab.data.chat_template import encoder_of
from sftlab.data.messages import Conversation
from sftlab.data.sequence_facts import cut_sequences
from sftlab.data.splits import Splits
from sftlab.data.token_sequence import labels_of
from sftlab.data.tokenized_dataset import (
    encoding_settings,
    refuse_other_encoding,
    training_rows,
)


class ShownRow(NamedTuple):
    """Token ids and labels as they are trained on, and the number of tokens before the cut."""

    ids: list[int]
    labels: list[int]
    whole: int


def shown_rows(
    splits: Splits, tokenizer: PreTrainedTokenizerBase, training: TrainingArguments
) -> Iterator[ShownRow]:
    """Yield the training sequences in the order of the data set, those without a loss too.

    Rows of a tokenized data set are cut already.
    """
    if splits.tokens:
        refuse_other_encoding(splits.tokens, tokenizer, training)
        for row in training_rows(splits.train, splits.tokens, "train"):
            yield ShownRow(row["input_ids"], row["labels"], len(row["input_ids"]))
        return
    settings, encoder = encoding_settings(tokenizer, training), encoder_of(tokenizer)
    for row in splits.train:
        (sequences,) = encoder([Conversation.from_row(row)])
        for one in cut_sequences(sequences, settings):
            yield ShownRow(one.ids, labels_of(one.ids, one.spans), one.tokens)
