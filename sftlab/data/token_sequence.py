"""Token ids of a sequence, and which of them are in the loss."""

from collections.abc import Sequence
from typing import NamedTuple


class TokenSequence(NamedTuple):
    """Token ids, and the runs of them that are in the loss.

    `spans` holds a start and a length for each run, one behind the other, in order. A sequence that
    `divides` is trained on in pieces where it is too long, and not cut.
    """

    ids: list[int]
    spans: list[int]
    divides: bool = False

    def in_loss(self) -> int:
        """Returns the number of tokens in the loss."""
        return sum(self.spans[1::2])

    def cut(self, limit: int | None, truncation_mode: str) -> "TokenSequence":
        """Returns the first `limit` tokens, or the last ones under `keep_end`."""
        if limit is None or len(self.ids) <= limit:
            return self
        first = len(self.ids) - limit if truncation_mode == "keep_end" else 0
        spans: list[int] = []
        for start, length in zip(self.spans[::2], self.spans[1::2], strict=True):
            begin, end = max(0, start - first), min(limit, start + length - first)
            if begin < end:
                spans += [begin, end - begin]
        return TokenSequence(self.ids[first : first + limit], spans)

    def pieces(self, limit: int | None) -> list["TokenSequence"]:
        """Returns pieces of at most `limit` tokens, all in the loss, which join to the whole."""
        size = limit or max(1, len(self.ids))
        parts = [self.ids[start : start + size] for start in range(0, len(self.ids), size)]
        return [TokenSequence(part, [0, len(part)]) for part in parts]


def labels_of(ids: Sequence[int], spans: Sequence[int]) -> list[int]:
    """Returns the ids that are in the loss, and -100 in place of the others."""
    labels = [-100] * len(ids)
    for start, length in zip(spans[::2], spans[1::2], strict=True):
        labels[start : start + length] = ids[start : start + length]
    return labels
