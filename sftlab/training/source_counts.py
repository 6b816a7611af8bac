"""How much of each streamed data set was trained on: nobody knows it before the training."""

from collections.abc import Iterable, Sequence
from typing import Any

from accelerate.utils import gather_object


class SourceCounts:
    """Sequences and tokens that this process has trained on, of each data set, over all starts."""

    def __init__(self) -> None:
        self._counts: dict[int, list[int]] = {}

    def add(self, rows: Iterable[tuple[int, int]]) -> None:
        """Add the rows of a micro-batch: the data set's number and the tokens of each."""
        for source, tokens in rows:
            counts = self._counts.setdefault(source, [0, 0])
            counts[0] += 1
            counts[1] += tokens

    def state(self) -> dict[str, Any]:
        """Returns the counts as JSON."""
        return {"counts": [[source, *counts] for source, counts in self._counts.items()]}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        self._counts = {source: counts for source, *counts in state["counts"]}

    def facts(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Returns the counts of each data set over all processes. Every process calls it."""
        totals = [[0, 0] for _ in names]
        for counts in gather_object([self._counts]):
            for source, (sequences, tokens) in counts.items():
                totals[source][0] += sequences
                totals[source][1] += tokens
        return [
            {"dataset": name, "sequences": sequences, "tokens": tokens}
            for name, (sequences, tokens) in zip(names, totals, strict=True)
        ]
