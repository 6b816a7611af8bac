"""Rows of an own validation or test file that ask what rows of another split ask."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from sftlab.data.tokenized_dataset import SPLITS


def known_rows(
    openings: Sequence[np.ndarray], own: Collection[str]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns which rows of the splits in `own` a split before them has, [rows] bool each.

    `openings` are the keys of the questions of train, validation and test. Only splits in `own`,
    which have files of their own, are searched: a hash keeps the others apart. Also returns how
    many rows are known, and the first one's number, for run.json.
    """
    known, facts = {}, {}
    for index, name in enumerate(SPLITS):
        if name not in own:
            continue
        seen = np.concatenate(openings[:index])
        known[name] = np.isin(openings[index], seen)
        if known[name].any():
            first = int(np.flatnonzero(known[name])[0])
            facts[name] = {"rows": int(known[name].sum()), "first": first}
    return known, {"left_out_as_known": facts} if facts else {}
