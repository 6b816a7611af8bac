"""What became of the rows of the data sets, for run.json."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from sftlab.data.column_names import used_columns
from sftlab.data.converter import EQUAL_SIDES, MOST_ROWS, NO_RESPONSE, NO_TURN
from sftlab.data.row_notes import count_notes, unused_columns
from sftlab.data.sources import Source
from sftlab.data.text_rows import JSON_ROW
from sftlab.data.tokenized_dataset import SPLITS


def shape_facts(sources: list[Source]) -> dict[str, Any]:
    """Returns the data format, and the columns that stand under another name."""
    shapes = dict.fromkeys(source.reader.data_format for source in sources)
    columns = sources[0].reader.columns
    return {"shape": " and ".join(shapes)} | ({"columns": columns} if columns else {})


def row_facts(sources: list[Source], converted: list[Dataset]) -> dict[str, Any]:
    """Returns how many rows there are, and what is dropped and not used of them."""
    facts = {
        "rows_there": sum(source.rows_there for source in sources),
        "rows_read": sum(len(source.rows) for source in sources),
    }
    split_of, without_turn, noted = [], [], []
    for rows in converted:
        table = rows.with_format("arrow")[:]
        split_of.append(table["split"].to_numpy())
        without_turn += table["conversation"].filter(pc.equal(table["split"], NO_TURN)).to_pylist()
        noted += [
            (one["values"], one["counts"]) for one in pc.value_counts(table["notes"]).to_pylist()
        ]
    facts |= dropped_facts(np.concatenate(split_of), without_turn) | count_notes(noted)
    facts["not_used"] = dict(Counter(facts["not_used"]) + Counter(not_used_of(sources)))
    return facts


def not_used_of(sources: list[Source]) -> dict[str, int]:
    """Returns the columns of typed rows that are not trained on, with the rows that fill them.

    Those of JSON are found row by row.
    """
    found: Counter[str] = Counter()
    for source in sources:
        names, read = source.rows.column_names, source.reader
        used = used_columns(read.data_format, read.columns).values()
        unused = [name for name in names if name not in (*used, JSON_ROW)]
        found.update(unused_columns(source.rows.select_columns(unused), read.data_format))
    return dict(found)


def dropped_facts(split_of: np.ndarray, without_turn: list[int]) -> dict[str, Any]:
    """Returns how many answers and rows are in no split and why, for run.json.

    `without_turn` are the numbers of the rows without any answer to a user.
    """
    equal = int((split_of == EQUAL_SIDES).sum())
    return ({"equal_pairs_dropped": equal} if equal else {}) | {
        "empty_responses_dropped": int((split_of == NO_RESPONSE).sum()),
        "rows_without_an_answer": len(without_turn),
        "first_without_an_answer": without_turn[0] % MOST_ROWS if without_turn else None,
    }


def dropped_words(facts: Mapping[str, Any]) -> str:
    """Returns how many rows are in no split and why, in words; "" for none."""
    dropped = {
        "without a response": facts.get("empty_responses_dropped", 0),
        "without an answer to a user": facts.get("rows_without_an_answer", 0),
        "with equal sides": facts.get("equal_pairs_dropped", 0),
        "that are not text": facts.get("bad_rows_left_out", 0),
    }
    return ", ".join(f"{count:,} {why}" for why, count in dropped.items() if count)


def refuse_empty(
    rows: int,
    split: str,
    dataset: str | None,
    fractions: Sequence[float],
    openings: Sequence[np.ndarray] = (),
    facts: Mapping[str, Any] = MappingProxyType({}),
    own: str | None = None,
) -> None:
    """Raise ValueError for a split that should have rows and has none.

    `openings` are the keys of the first questions of every split's rows, `facts` those of
    `dropped_facts`. `own` names the data that all of the split's rows come from, if it has such.
    """
    if rows:
        return
    if own is not None:
        raise ValueError(
            f"the {split} split is empty: {own} has no usable row that is not in another split"
        )
    if fractions[SPLITS.index(split)] > 0:
        keys = np.concatenate([*openings, np.zeros(0, np.int64)])
        rows, questions = len(keys), len(np.unique(keys))
        together = "" if questions == rows else "; rows with one first question stay together"
        alike = "" if questions == rows else f", which begin with {questions} different questions"
        dropped = dropped_words(facts)
        besides = f" (and {dropped})" if dropped else ""
        raise ValueError(
            f"the {split} split of {dataset} is empty: {rows} usable rows{besides}{alike}, with "
            f"split_fractions {list(fractions)}; give more rows or other fractions (0 for a split "
            f"that is not wanted){together}"
        )


def source_settings(source: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what one of several data sets is. `source` are its `settings_of`."""
    reader = source["reader"]
    return {
        "dataset": reader["name"],
        "shape": reader["data_format"],
        "columns": reader["columns"],
        "weight": source["weight"],
    }


def source_facts(
    sources: list[dict[str, Any]], numbers: Sequence[Iterable[int]], before: Sequence[int]
) -> list[dict[str, Any]]:
    """Returns for each of several data sets what it is and how many rows each split has of it.

    `sources` are their `settings_of`, `numbers` the sources of the rows of each split. A row that
    an epoch repeats counts as often. `before` are the training rows of each before they are mixed
    (`train_there`).
    """
    before = [*before, *[0] * (len(sources) - len(before))]
    counts = [np.bincount(np.asarray(of_split), minlength=len(sources)) for of_split in numbers]
    return [
        {
            **source_settings(source),
            "rows_there": source["rows_there"],
            "rows_read": source["rows"],
            "train_there": int(before[number]),
            **{name: int(count[number]) for name, count in zip(SPLITS, counts, strict=True)},
        }
        for number, source in enumerate(sources)
    ]
