"""Which rows a step has, and which process and micro-batch trains them."""

import heapq
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from torch.utils.data import IterableDataset, RandomSampler, Sampler, SequentialSampler


class BalancedSampler(Sampler[int]):
    """The order of `sampler`, but within each global batch dealt to micro-batches of nearly equal
    token counts.

    `lengths` has the tokens of every row; a global batch is `micro_batches` (over all processes) of
    `micro_batch` rows.
    """

    def __init__(
        self, sampler: Sampler[int], lengths: Sequence[int], micro_batch: int, micro_batches: int
    ) -> None:
        self.sampler = sampler
        self._lengths, self._micro_batch, self._micro_batches = lengths, micro_batch, micro_batches

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        rows: list[int] = []
        for row in self.sampler:
            rows.append(row)
            if len(rows) == self._micro_batch * self._micro_batches:
                for bin_ in balanced(rows, self._lengths, self._micro_batches):
                    yield from bin_
                rows = []
        yield from rows

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def whole_batches(
    sampler: RandomSampler | SequentialSampler,
    global_batch: int,
    shuffled: Callable[..., Sampler] = RandomSampler,
) -> Sampler[int]:
    """The sampler without the rows that do not fill a global batch, others in every epoch where it
    shuffles.

    A last, partial batch would be filled up with repeated rows under DDP and not on one process;
    whole global batches alone are the same under every world size. Raises ValueError where there is
    none.
    """
    whole = len(sampler) - len(sampler) % global_batch
    refuse_few_rows(len(sampler), global_batch)
    if isinstance(sampler, RandomSampler):
        return shuffled(sampler.data_source, num_samples=whole)
    return SequentialSampler(range(whole))


def refuse_few_rows(rows: int, global_batch: int, lost: str = "") -> None:
    """Raise ValueError where there is not one global batch of rows.

    `lost` says what became of others.
    """
    if rows < global_batch:
        raise ValueError(
            f"{rows} training rows do not fill one global batch of {global_batch}{lost}: give more "
            "rows or a smaller "
            f"global_batch_size"
        )


def balanced(rows: Sequence[int], lengths: Sequence[int], bins: int) -> list[list[int]]:
    """Deal `rows` into `bins` of equally many rows:

    the longest first, each to the lightest bin that has room.
    """
    size = len(rows) // bins
    dealt: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0, index) for index in range(bins)]
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        tokens, index = heapq.heappop(heap)
        dealt[index].append(row)
        if len(dealt[index]) < size:
            heapq.heappush(heap, (tokens + int(lengths[row]), index))
    return dealt


class WholeBatches(IterableDataset):
    """A stream without the rows at its end that do not fill a global batch.

    Every process then has as many rows as any other, and accumulation ends where a pass does.
    accelerate would deal a data set of several files file by file, and some processes would wait
    for others that have no more rows.
    """

    def __init__(self, rows: IterableDataset, global_batch: int) -> None:
        self._rows, self._global_batch = rows, global_batch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = iter(self._rows)
        while len(batch := list(islice(rows, self._global_batch))) == self._global_batch:
            yield from batch

    def set_epoch(self, epoch: int) -> None:
        """Another order where the stream shuffles."""
        self._rows.set_epoch(epoch)


def row_lengths(dataset: Dataset) -> np.ndarray:
    """Tokens of every row."""
    return pc.list_value_length(dataset.with_format("arrow")[:]["input_ids"]).to_numpy()
