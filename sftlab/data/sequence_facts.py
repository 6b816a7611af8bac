"""What `max_length` leaves of the sequences of conversations, counted."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from sftlab.data.token_sequence import TokenSequence


class Cut(NamedTuple):
    """A sequence within `max_length`, and its tokens before it was cut.

    `part` is its number among the sequences of its conversation.
    """

    ids: list[int]
    spans: list[int]
    tokens: int
    loss_tokens: int
    loss_kept: int
    part: int


def cut_sequences(made: Iterable[TokenSequence], settings: Mapping[str, Any]) -> list[Cut]:
    """Returns the sequences of a conversation, cut as `settings` say, or a document in pieces.

    Settings are `max_length`, `truncation_mode` and `completion_only_loss`, as in the recipe; where
    the last is false, every token is in the loss.
    """
    limit, found = settings["max_length"], []
    for part, one in enumerate(made):
        if one.divides:
            # pieces of one document are no sequences of a conversation: all are number 0
            for piece in one.pieces(limit):
                size = len(piece.ids)
                found.append(Cut(piece.ids, piece.spans, size, size, size, 0))
            continue
        if not settings["completion_only_loss"]:
            one = TokenSequence(one.ids, [0, len(one.ids)] if one.ids else [])
        kept = one.cut(limit, settings["truncation_mode"])
        found.append(Cut(kept.ids, kept.spans, len(one.ids), one.in_loss(), kept.in_loss(), part))
    return found


def count(
    tokens: np.ndarray,
    loss_tokens: np.ndarray,
    loss_kept: np.ndarray,
    part: np.ndarray,
    limit: int | None,
) -> dict[str, int]:
    """Returns what became of sequences, whose tokens were counted before they were cut.

    `loss_kept` are the tokens in the loss that the cut left. `cut` and `tokens` are of the
    sequences that are kept, `split` is the number of conversations with several sequences.
    """
    kept, within = _within(tokens, loss_kept, limit)
    return {
        "kept": int(kept.sum()),
        "dropped": int((~kept).sum()),
        "cut": int((tokens[kept] > within).sum()),
        "tokens": int(within.sum()),
        "longest": int(within.max(initial=0)),
        "longest_before_cut": int(tokens.max(initial=0)),
        "loss_tokens": int(loss_kept.sum()),
        "loss_tokens_cut": int(loss_tokens.sum() - loss_kept.sum()),
        "conversations_split": int((part == 1).sum()),
    }


def _within(
    tokens: np.ndarray, loss_kept: np.ndarray, limit: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns which sequences are kept [rows] bool, and the tokens that the cut left of those."""
    kept = loss_kept > 0
    return kept, np.minimum(tokens, limit or np.iinfo(np.int32).max)[kept]


def split_line(facts: Mapping[str, int]) -> list[str]:
    """Returns the line that says how many conversations are a row for each answer, if any."""
    split = facts["conversations_split"]
    why = "the chat template writes earlier turns in another way once later ones follow"
    return [f"{split:,} conversations are a row for each answer: {why}"] if split else []


def count_sources(
    source: np.ndarray, tokens: np.ndarray, loss_kept: np.ndarray, sources: int, limit: int | None
) -> dict[str, list[dict[str, int]]]:
    """Returns the kept sequences of each of several data sets, and their tokens, as `sources`.

    `source` is the number of a sequence's data set.
    """
    kept, within = _within(tokens, loss_kept, limit)
    rows = np.bincount(source[kept], minlength=sources).tolist()
    total = np.bincount(source[kept], weights=within, minlength=sources).astype(int).tolist()
    return {"sources": [{"kept": r, "tokens": t} for r, t in zip(rows, total, strict=True)]}
