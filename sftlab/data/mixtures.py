"""How the rows of several data sets are mixed: how many of each, and in which order.

Nothing is drawn at random. So the rows of an epoch are the same for every seed, every number of
processes and every start, and the training's own seed shuffles them.
"""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets

FIRST = "first_exhausted"


def weights_of(weights: Sequence[float | None]) -> list[float] | None:
    """Returns the weights of a mixture, None where its data sets have none."""
    return None if None in weights else list(weights)


def rows_of_an_epoch(
    rows: Sequence[int], weights: Sequence[float] | None, strategy: str
) -> list[int]:
    """Returns how many rows each data set gives to an epoch.

    Without weights it gives all of them. With weights the numbers have their ratio. Under
    `first_exhausted` no row is repeated, and the data set that is used up first gives all of its
    rows. Under `all_exhausted` every row is used, and those of the other data sets are repeated.
    """
    if weights is None:
        return list(rows)
    shares = [weight / sum(weights) for weight in weights]
    wholes = [count / share for count, share in zip(rows, shares, strict=True)]
    whole = min(wholes) if strategy == FIRST else max(wholes)
    return [
        max(1, round(whole * share)) if count else 0
        for count, share in zip(rows, shares, strict=True)
    ]


def even_order(rows: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """Returns the places of an epoch's rows in the concatenated data sets, [sum of counts] int64.

    The rows of each data set keep their order, repeat from the first, and are spread evenly.
    """
    starts = np.cumsum([0, *rows])[:-1]
    places = [
        start + np.arange(count) % max(1, there)
        for start, count, there in zip(starts, counts, rows, strict=True)
    ]
    when = [(np.arange(count) + 0.5) / max(1, count) for count in counts]
    return np.concatenate(places)[np.argsort(np.concatenate(when), kind="stable")]


def joined(parts: list[Dataset]) -> Dataset:
    """Returns the rows of several data sets behind one another."""
    filled = [part for part in parts if len(part)] or parts[:1]
    return concatenate_datasets(filled) if len(filled) > 1 else filled[0]


def mixed(parts: list[Dataset], weights: Sequence[float] | None, strategy: str) -> Dataset:
    """Returns the rows of an epoch. One data set is left as it is."""
    if len(parts) == 1:
        return parts[0]
    rows = [len(part) for part in parts]
    order = even_order(rows, rows_of_an_epoch(rows, weights, strategy))
    return concatenate_datasets(parts).select(order)


def mixed_stream(
    parts: list[IterableDataset], weights: Sequence[float] | None, strategy: str
) -> IterableDataset:
    """Returns one stream of several, drawn by their weights with a fixed seed.

    Without weights they take turns until all have ended.
    """
    if len(parts) == 1:
        return parts[0]
    if weights is None:
        return interleave_datasets(parts, stopping_strategy="all_exhausted_without_replacement")
    shares = [weight / sum(weights) for weight in weights]
    return interleave_datasets(parts, probabilities=shares, seed=0, stopping_strategy=strategy)
