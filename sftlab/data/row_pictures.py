"""Rows of token ids as text that a person reads: the loss marked, lengths as a histogram."""

import re
from collections.abc import Sequence
from itertools import groupby
from textwrap import indent

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from sftlab.data.row_checks import MASKED
from sftlab.tables import aligned

# marks around the part in the loss: in colour (bold green), and in plain text
COLOUR, PLAIN = ("\x1b[1;32m", "\x1b[0m"), ("[[", "]]")
BINS, WIDTH = 10, 40


def marked_text(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    labels: Sequence[int],
    marks: tuple[str, str],
) -> str:
    """Returns the text of a row with marks around each run of tokens in the loss."""
    parts = []
    for in_loss, run in groupby(zip(ids, labels, strict=True), lambda one: one[1] != MASKED):
        text = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        parts.append(f"{marks[0]}{text}{marks[1]}" if in_loss else text)
    return "".join(parts)


def token_table(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int]
) -> str:
    """Returns a line a token: its place, its id, its text, and whether it is in the loss."""
    lines = [["place", "id", "text", "in the loss"]]
    for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
        text = repr(tokenizer.decode([token]))
        lines.append([str(place), str(token), text, "" if label == MASKED else "yes"])
    return aligned(lines)


def template_frame(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns what the chat template writes around a system prompt, a question and an answer.

    Raises ValueError for a template that refuses a question and its answer.
    """
    turns = [("user", "{question}"), ("assistant", "{answer}")]
    for roles in ([("system", "{system}"), *turns], turns):
        messages = [{"role": role, "content": text} for role, text in roles]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError as error:
            refusal = error
            continue
        bare = re.sub(r"\{(system|question|answer)\}", "", text)
        added = len(tokenizer(bare, add_special_tokens=False)["input_ids"])
        return f"{indent(text, '  ')}\n  = {added} tokens"
    raise ValueError(f"the chat template refuses a question and its answer: {refusal.message}")


def histogram(lengths: Sequence[int], limit: int | None) -> str:
    """Returns how many rows have how many tokens, as bars of text. Rows are cut at `limit`."""
    longest = max(lengths)
    step = max(1, -(-longest // BINS))
    counts = np.bincount((np.asarray(lengths) - 1).clip(0) // step)
    shown = range(int(np.flatnonzero(counts)[0]), len(counts))
    digits = len(f"{longest:,}")
    lines = []
    for number, count in ((number, int(counts[number])) for number in shown):
        low, high = number * step + 1, (number + 1) * step
        bar = "#" * -(-count * WIDTH // int(counts.max()))
        cut = " <- max_length" if limit is not None and low <= limit < high + 1 else ""
        span = f"{low:>{digits},}-{min(high, longest):<{digits},}"
        lines.append(f"  {span}  {bar:<{WIDTH}} {count:,}{cut}".rstrip())
    return "\n".join(lines)
