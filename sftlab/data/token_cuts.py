"""Where a text may be cut so that the ids of its parts join to the ids of the whole."""

import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, models, normalizers

# The pre-tokenizers of Llama 3 and Qwen 2. GPT-2's is built into the backend. In all three a match
# never goes on over a space behind a visible character, and never looks beyond that space.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPLITS = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
}


def common_prefix(ids: Sequence[Any], others: Sequence[Any]) -> int:
    """Returns the number of leading ids (or characters) that are equal."""
    return next(
        (i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b),
        min(len(ids), len(others)),
    )


class TurnEnds:
    """Tells whether a text may be cut where a turn ends: before or behind a special token."""

    def __init__(self, backend: Tokenizer) -> None:
        raw = _raw_tokens(backend) or []
        begin = [t for t in raw if not any(_overlaps(t, other) for other in raw)]
        end = [t for t in raw if not any(_overlaps(t[::-1], other[::-1]) for other in raw)]
        # other pre-tokenizers may treat the first word of a text in their own way
        self._begins, self._ends = tuple(begin), tuple(end if _splits_at_blanks(backend) else ())

    def __call__(self, text: str, place: int) -> bool:
        """Whether `text` may be cut at `place`."""
        return text.startswith(self._begins, place) or text.endswith(self._ends, 0, place)


def _raw_tokens(backend: Tokenizer) -> list[str] | None:
    """Returns the added tokens that split a text before it is normalized; None where unsure."""
    if backend.encode_special_tokens or not isinstance(backend.normalizer, normalizers.NFC | None):
        return None
    added = list(backend.get_added_tokens_decoder().values())
    if any(token.single_word or token.lstrip or token.rstrip for token in added):
        return None
    return [token.content for token in added if not token.normalized]


def cut_in(backend: Tokenizer, ending: str) -> int | None:
    """Returns where in `ending` a text may be cut so that the parts' ids join to the whole's.

    One such place is before a special token, because the backend splits the text there first. For
    the pre-tokenizers named above another one is a space between two visible ASCII characters,
    because a word always ends there. Returns None where no place is known.
    """
    raw = _raw_tokens(backend)
    if raw is None:
        return None
    places = [
        ending.rfind(text)
        for text in raw
        if text in ending and not any(_overlaps(text, o) for o in raw)
    ]
    added = backend.get_added_tokens_decoder().values()
    if _splits_at_blanks(backend) and not any(
        re.search(r"\S \S", token.content) for token in added
    ):
        places += [found.start() + 1 for found in re.finditer("(?=[!-~] [!-~])", ending)]
    return max(places, default=None)


def _overlaps(text: str, other: str) -> bool:
    """Whether `other` may be found at a place that overlaps an occurrence of `text`."""
    around = text in other and text != other
    return around or any(other.endswith(text[:size]) for size in range(1, len(text)))


def _splits_at_blanks(backend: Tokenizer) -> bool:
    if (
        not isinstance(backend.model, models.BPE)
        or backend.model.dropout
        or backend.pre_tokenizer is None
    ):
        return False
    state = json.loads(backend.pre_tokenizer.__getstate__())
    parts = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    if [part["type"] for part in parts] == ["ByteLevel"]:
        return parts[0]["use_regex"] and not parts[0]["add_prefix_space"]
    if [part["type"] for part in parts] != ["Split", "ByteLevel"]:
        return False
    split, byte_level = parts
    known = (
        split["pattern"].get("Regex") in _SPLITS
        and split["behavior"] == "Isolated"
        and not split["invert"]
    )
    return known and not byte_level["use_regex"] and not byte_level["add_prefix_space"]
