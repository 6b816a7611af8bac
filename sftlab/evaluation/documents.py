"""Held-out documents of plain text: scored by their likelihood, as they have no answers."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from sftlab.data.chat_template import encoder_of
from sftlab.data.messages import Conversation
from sftlab.evaluation.held_out import HeldOut, ScoredRows
from sftlab.models.likelihood import Likelihood
from sftlab.runs.run_directory import SIDES


def holds_documents(dataset: HeldOut) -> bool:
    """Whether every held-out row is a document."""
    return all(Conversation.from_row(row).is_document for row in dataset.rows)


def select_documents(
    dataset: HeldOut, samples: int, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> ScoredRows:
    """Returns the first `samples` documents (0: all) in pieces of `max_length` tokens.

    They are divided as training divides them. A piece's number counts from 0, and `conversation` is
    its document.
    """
    chosen = dataset.rows.select(range(min(samples or len(dataset.rows), len(dataset.rows))))
    rows, encoded = [], []
    encoder = encoder_of(tokenizer)
    for row in chosen:
        ((whole,),) = encoder([Conversation.from_row(row)])
        for piece in whole.pieces(max_length):
            if len(piece.ids) < 2:  # no token follows another one
                continue
            rows.append({"conversation": row["conversation"]})
            encoded.append({"input_ids": piece.ids, "labels": piece.ids})
    return ScoredRows(list(range(len(rows))), rows, encoded, [[]] * len(rows), {})


def document_records(rows: ScoredRows, nll: dict[str, Likelihood]) -> list[dict[str, Any]]:
    """Returns one record a piece: its document, and both models' sum of nats and tokens."""
    return [
        {"piece": number, "conversation": rows.rows[number]["conversation"]}
        | {side: {"text_nll": nll[side].text[number].tolist()} for side in SIDES}
        for number in rows.numbers
    ]
