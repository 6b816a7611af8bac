"""Training rows and pairs encoded one by one, for people to look at."""

from collections.abc import Iterator
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from sftlab.config.preference_fields import PreferenceArguments
from sftlab.config.recipe import TrainingArguments
from sftlab.data.chat_template import encoder_of
from sftlab.data.encoded_pairs import PROMPT, answer_end, encode_pair
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


class ShownPair(NamedTuple):
    """Both sides of a preference pair. `left_out` says why it is not trained on, '' where it is."""

    chosen: ShownRow
    rejected: ShownRow
    left_out: str


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


def shown_pairs(
    splits: Splits, tokenizer: PreTrainedTokenizerBase, training: PreferenceArguments
) -> Iterator[ShownPair]:
    """Yield the training pairs in the order of the data set, those that are left out too."""
    encoder, limit = encoder_of(tokenizer), training.max_length
    for row in splits.train:
        pair = Conversation.from_row(row)
        (chosen,), (rejected,) = encoder([pair, pair.rejected_side()])
        found = encode_pair(chosen, rejected, limit)
        sides = []
        for ids, whole in ((found["chosen_ids"], chosen), (found["rejected_ids"], rejected)):
            labels = labels_of(ids, (found[PROMPT], max(len(ids) - found[PROMPT], 0)))
            sides.append(ShownRow(ids, labels, answer_end(whole)))
        why = "" if found["kept"] else f"max_length {limit} leaves a side without an answer"
        yield ShownPair(*sides, f"max_length {limit} makes its sides equal" * found["equal"] or why)
