"""Which rows a step has, and which process and micro-batch they go to."""

import heapq
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from torch.utils.data import IterableDataset, RandomSampler, Sampler, SequentialSampler


class BalancedSampler(Sampler[int]):
    """Deals the rows of each global batch to micro-batches with nearly equal token counts.

    Global batches follow the order of `sampler`. One has `micro_batches` (over all processes) of
    `micro_batch` rows. `lengths` are the tokens of every row. Processes then hardly wait for one
    another.
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
        """Shuffle for another epoch."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def whole_batches(
    sampler: RandomSampler | SequentialSampler,
    global_batch: int,
    shuffled: Callable[..., Sampler] = RandomSampler,
) -> Sampler[int]:
    """Returns the sampler without the last rows that do not fill a global batch.

    Where it shuffles, other rows are left out in every epoch. DDP would fill a partial batch with
    repeated rows, and one process would not. Whole global batches are the same under every world
    size. Raises ValueError where there is none.
    """
    whole = len(sampler) - len(sampler) % global_batch
    refuse_few_rows(len(sampler), global_batch)
    if isinstance(sampler, RandomSampler):
        return shuffled(sampler.data_source, num_samples=whole)
    return SequentialSampler(range(whole))


def refuse_few_rows(rows: int, global_batch: int, lost: str = "") -> None:
    """Raise ValueError where the rows do not fill one global batch.

    `lost` says in the message what became of other rows.
    """
    if rows < global_batch:
        raise ValueError(
            f"{rows} training rows do not fill one global batch of {global_batch}{lost}: give more "
            "rows or a smaller global_batch_size"
        )


def balanced(rows: Sequence[int], lengths: Sequence[int], bins: int) -> list[list[int]]:
    """Deal `rows` into `bins` with equally many rows and nearly equal tokens.

    The longest row comes first. Each goes to the bin with the fewest tokens that has room.
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
    """A stream without its last rows that do not fill a global batch.

    Every process then has equally many rows, and accumulation ends with an epoch. accelerate would
    deal out whole files instead, and some processes would wait for others without rows.
    """

    def __init__(self, rows: IterableDataset, global_batch: int) -> None:
        self._rows, self._global_batch = rows, global_batch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = iter(self._rows)
        while len(batch := list(islice(rows, self._global_batch))) == self._global_batch:
            yield from batch

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for another epoch, where the stream shuffles."""
        self._rows.set_epoch(epoch)


def row_lengths(dataset: Dataset, column: str = "input_ids") -> np.ndarray:
    """Returns the number of tokens of every row."""
    return pc.list_value_length(dataset.with_format("arrow")[:][column]).to_numpy()
