"""How long are the training rows of a recipe? Measured, or read from a local data set."""

import math
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sftlab.config.data_words import single_names
from sftlab.config.recipe import Recipe
from sftlab.data.chat_template import encoder_of, set_template
from sftlab.data.collator import TOKENS_MULTIPLE
from sftlab.data.converter import Converter
from sftlab.data.data_files import expanded
from sftlab.data.encoded_pairs import IDS, encode_pair
from sftlab.data.messages import Conversation
from sftlab.data.mixtures import rows_of_an_epoch, weights_of
from sftlab.data.open_tokens import open_tokens
from sftlab.data.samplers import row_lengths
from sftlab.data.sequence_facts import cut_sequences
from sftlab.data.sources import Source, read_sources
from sftlab.data.tokenized_dataset import SPLITS, is_tokenized

# Rows of a data set that are read for their lengths.
SAMPLE = 400


class RowLengths(NamedTuple):
    """The tokens of training rows: mean, standard deviation and maximum.

    `count` is the number of rows, None where it is unknown. `source` says where this is from. A
    preference pair is a row of two `sequences`; `longest` counts the padding of its shorter side.
    """

    count: int | None
    mean: float
    deviation: float
    longest: int
    source: str
    sequences: int = 1

    @property
    def attended(self) -> float:
        """The length of the sequence that the average token is in."""
        return (self.mean + self.deviation**2 / self.mean) / self.sequences

    def largest(self, rows: int, micro_batches: int, packed: bool, steps: int) -> int:
        """Returns the tokens of the largest micro-batch that `steps` steps are likely to have.

        Padding counts. A micro-batch has `rows` rows, and a step has `micro_batches` of all
        processes together.
        """
        if not packed:
            return rows * self.longest
        # the largest of so many normal sums (Blom 1958); a global batch is dealt evenly, so its
        # micro-batches share its deviation
        far = NormalDist().inv_cdf((steps - 0.375) / (steps + 0.25))
        deviation = self.deviation * math.sqrt(rows / micro_batches)
        likely = min(rows * self.mean + far * deviation, rows * self.longest)
        return math.ceil(likely / TOKENS_MULTIPLE) * TOKENS_MULTIPLE


def of_lengths(lengths: np.ndarray, count: int | None, source: str) -> RowLengths:
    """Returns the summary of these lengths."""
    return RowLengths(
        count, float(lengths.mean()), float(lengths.std()), int(lengths.max()), source
    )


def of_pairs(
    chosen: np.ndarray, rejected: np.ndarray, count: int | None, source: str
) -> RowLengths:
    """Returns the summary of pairs, whose sides have these lengths."""
    padded = 2 * int(np.maximum(chosen, rejected).max())
    both = of_lengths(chosen + rejected, count, source)
    return both._replace(longest=padded, sequences=2)


def of_encoded(rows: Dataset) -> RowLengths:
    """Returns the summary of a trainer's encoded rows or pairs."""
    if IDS[0] not in rows.column_names:
        return of_lengths(row_lengths(rows), len(rows), "its tokens")
    sides = (row_lengths(rows, name) for name in IDS)
    return of_pairs(*sides, len(rows), "its tokens")


def measure_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> RowLengths:
    """Returns the lengths of all rows of a tokenized data set, of `SAMPLE` rows of a local file.

    Raises ValueError for a data set that is not on this machine.
    """
    data, limit = recipe.data, recipe.training.max_length or np.iinfo(np.int64).max
    name = str(data.dataset_name)
    if is_tokenized(name):
        lengths = np.minimum(row_lengths(open_tokens(data)[0]), limit)
        return of_lengths(lengths, len(lengths), "its tokens")
    if not all(Path(one).exists() for one in expanded(single_names(name))):
        raise ValueError(
            f"data set {name} is not a file on this machine: pass --rows COUNT and --row_tokens "
            "MEAN, the tokens of an average row"
        )
    if data.dataset_streaming:
        raise ValueError(
            "a plan does not read the rows of a stream: pass --row_tokens MEAN, the tokens of an "
            "average row"
        )
    return _sampled(recipe, tokenizer)


def _sampled(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> RowLengths:
    """Returns the lengths of the training rows among rows spread over local files."""
    data, training = recipe.data, recipe.training
    set_template(tokenizer, training.chat_template_path)
    divided = [source for source in read_sources(data) if source.split is None]
    measure = _pair_lengths_of if recipe.training.method == "dpo" else _lengths_of
    lengths = [measure(source, recipe, tokenizer) for source in divided]
    found = sum(map(len, lengths))
    if not all(map(len, lengths)):
        raise ValueError(
            f"none of {SAMPLE} rows of {data.dataset_name} is a training row: see split_fractions"
        )
    there = [
        round(len(source.rows) * len(of_one) / min(SAMPLE, len(source.rows)))
        for source, of_one in zip(divided, lengths, strict=True)
    ]
    weights = weights_of([source.weight for source in divided])
    counts = rows_of_an_epoch(there, weights, data.datasets_stopping_strategy)
    # as many lengths of each data set as its rows in an epoch, which they stand for
    parts = [
        np.resize(of_one, (max(1, round(found * count / sum(counts))), *of_one.shape[1:]))
        for of_one, count in zip(lengths, counts, strict=True)
    ]
    every, source = np.concatenate(parts), f"{found} of its rows"
    if every.ndim == 2:
        return of_pairs(*every.T, sum(counts), source)
    return of_lengths(every, sum(counts), source)


def _lengths_of(source: Source, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Returns the tokens of the training sequences among `SAMPLE` rows of a data set."""
    encoded = encoder_of(tokenizer)(_conversations(source, recipe))
    training = recipe.training
    settings = {name: getattr(training, name) for name in ("max_length", "truncation_mode")}
    settings["completion_only_loss"] = training.completion_only_loss is not False
    return np.array([len(one.ids) for made in encoded for one in cut_sequences(made, settings)])


def _pair_lengths_of(
    source: Source, recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> np.ndarray:
    """Returns the tokens of both sides of the training pairs among `SAMPLE` rows, [pairs, 2]."""
    pairs = _conversations(source, recipe)
    sides = [side for pair in pairs for side in (pair, pair.rejected_side())]
    made = [sequences[0] for sequences in encoder_of(tokenizer)(sides)]
    both = zip(made[::2], made[1::2], strict=True)
    found = [encode_pair(*pair, recipe.training.max_length) for pair in both]
    return np.array([[len(one[name]) for name in IDS] for one in found if one["kept"]])


def _conversations(source: Source, recipe: Recipe) -> list[Conversation]:
    """Returns the training conversations among `SAMPLE` rows of a data set."""
    picked = np.unique(np.linspace(0, len(source.rows) - 1, SAMPLE).astype(int))
    convert = Converter(source.reader, source.fractions, recipe.data.loss_on)
    made = convert(source.rows[picked], picked.tolist())
    rows = [dict(zip(made, values, strict=True)) for values in zip(*made.values(), strict=True)]
    train = [row for row in rows if row["split"] == SPLITS.index("train")]
    return [Conversation.from_row(row) for row in train]
