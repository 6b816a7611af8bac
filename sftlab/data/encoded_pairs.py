"""Preference pairs become two sequences of token ids each, with the prompt that they share."""

import json
from collections.abc import Mapping

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import global_then_local_main_first

from sftlab.config.preference_fields import PreferenceArguments
from sftlab.data.batch_encoder import Encoder
from sftlab.data.chat_template import encoder_of
from sftlab.data.encoded_rows import ROWS_AT_ONCE, Encoded, conversations_of
from sftlab.data.splits import Splits
from sftlab.data.token_sequence import TokenSequence, labels_of
from sftlab.data.tokenized_dataset import encoding_settings

# whole sequences, and how many tokens of them are the prompt
IDS = ("chosen_ids", "rejected_ids")
PROMPT = "prompt_length"
_COUNTED = ("tokens", "longest", "loss_tokens", "loss_kept", "cut", "kept", "equal")
# of what is made: caches of other versions are not read
_VERSION = 1


class _EncodePairs:
    """Encodes batches of converted pairs. It can be pickled."""

    def __init__(self, encoder: Encoder, limit: int | None) -> None:
        self._encoder, self._limit = encoder, limit

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        pairs = conversations_of(batch)
        sides = [side for one in pairs for side in (one, one.rejected_side())]
        made = [sequences[0] for sequences in self._encoder(sides)]
        found = [
            encode_pair(chosen, rejected, self._limit)
            for chosen, rejected in zip(made[::2], made[1::2], strict=True)
        ]
        return {name: [one[name] for one in found] for name in found[0]}


def encode_pair(
    chosen: TokenSequence, rejected: TokenSequence, limit: int | None
) -> dict[str, list[int] | int]:
    """Returns the ids of a pair within `limit` tokens a side, and what was counted before the cut.

    The answers begin where either side leaves the prompt, as in trl. `kept` is 0 where a side has
    no token left, and where the cut sides are equal (`equal` is 1).
    """
    starts = [one.spans[0] if one.spans else len(one.ids) for one in (chosen, rejected)]
    start, whole = min(starts), [one.ids[: answer_end(one)] for one in (chosen, rejected)]
    within = [ids[:limit] for ids in whole]
    answers = [ids[start:] for ids in within]
    equal = answers[0] == answers[1]
    kept = all(answers) and not equal
    return {
        "chosen_ids": within[0],
        "rejected_ids": within[1],
        PROMPT: start,
        "tokens": sum(map(len, within)) if kept else 0,
        "longest": max(map(len, whole)),
        "loss_tokens": sum(len(ids) - start for ids in whole),
        "loss_kept": sum(map(len, answers)) if kept else 0,
        "cut": int(within != whole and kept),
        "kept": int(kept),
        "equal": int(equal and all(answers)),
    }


def answer_end(side: TokenSequence) -> int:
    """Returns how many tokens of a side there are up to the end of its answer."""
    return sum(side.spans[-2:])


def encode_pairs(
    splits: Splits, tokenizer: PreTrainedTokenizerBase, training: PreferenceArguments
) -> dict[str, Encoded]:
    """Returns the encoded pairs of train and validation.

    Pairs with a side that has no token within `max_length` are left out, and so are pairs that the
    cut makes equal. A process of several waits for the first one.
    """
    rows = {"train": splits.train, "validation": splits.validation}
    return {name: _encode(part, tokenizer, training, name) for name, part in rows.items()}


def _encode(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, training: PreferenceArguments, name: str
) -> Encoded:
    if not len(rows):  # `map` would give it no columns
        return Encoded(
            Dataset.from_dict({name: [] for name in (*IDS, PROMPT)}), _facts({}, training)
        )
    settings = encoding_settings(tokenizer, training)
    features = Features(
        dict.fromkeys(IDS, List(Value("int32")))
        | dict.fromkeys((PROMPT, *_COUNTED), Value("int32"))
    )
    with global_then_local_main_first():
        made = rows.map(
            _EncodePairs(encoder_of(tokenizer), training.max_length),
            batched=True,
            batch_size=ROWS_AT_ONCE,
            remove_columns=rows.column_names,
            features=features,
            num_proc=training.dataset_num_proc,
            new_fingerprint=Hasher.hash([rows._fingerprint, json.dumps(settings), _VERSION]),
            desc=f"Encoding {name} pairs",
        )
    counted = made.select_columns(list(_COUNTED)).with_format("numpy")[:]
    kept = made.select(np.flatnonzero(counted["kept"])).select_columns([*IDS, PROMPT])
    return Encoded(kept, _facts(counted, training))


def sequences_of(rows: Dataset, side: str) -> Dataset:
    """Returns one side of encoded pairs, chosen or rejected, as rows of `input_ids` and `labels`.

    The labels are made when a row is read; columns of the Arrow table have the ids alone.
    """
    ids = f"{side}_ids"
    chosen = rows.select_columns([ids, PROMPT]).rename_column(ids, "input_ids")
    return chosen.with_transform(_with_labels)


def _with_labels(batch: dict[str, list]) -> dict[str, list]:
    pairs = zip(batch["input_ids"], batch[PROMPT], strict=True)
    return batch | {"labels": [labels_of(ids, (start, len(ids) - start)) for ids, start in pairs]}


def _facts(counted: Mapping[str, np.ndarray], training: PreferenceArguments) -> dict[str, int]:
    """Returns what `max_length` left of the pairs; tokens are those of both sides."""
    none = np.zeros(0, np.int64)
    column = {name: counted.get(name, none) for name in _COUNTED}
    longest = int(column["longest"].max(initial=0))
    return {
        "kept": int(column["kept"].sum()),
        "dropped": int((column["kept"] == 0).sum()),
        "equal_after_cut": int(column["equal"].sum()),
        "cut": int(column["cut"].sum()),
        "tokens": int(column["tokens"].sum()),
        "longest": min(longest, training.max_length or longest),
        "longest_before_cut": longest,
        "loss_tokens": int(column["loss_kept"].sum()),
        "loss_tokens_cut": int(column["loss_tokens"].sum() - column["loss_kept"].sum()),
        "conversations_split": 0,
    }
