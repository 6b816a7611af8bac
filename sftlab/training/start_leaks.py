"""Do training rows ask what the test rows of the run to go on from ask?"""

from pathlib import Path

import numpy as np
from datasets import Dataset

from sftlab.config.recipe import DataArguments, ModelArguments
from sftlab.data.splits import Splits, load_splits
from sftlab.exit_messages import first_line
from sftlab.models.started_adapter import adapter_folder
from sftlab.runs.record import RECORD, read_run


def refuse_tested_rows(model: ModelArguments, splits: Splits) -> list[str]:
    """Refuse training rows whose question is in the test split of the run to go on from.

    That run's scores would mean nothing for the model that comes of it. Returns a line where this
    cannot be known, else nothing. Raises ValueError for such rows.
    """
    if model.adapter_name_or_path is None:
        return []
    before = adapter_folder(model.adapter_name_or_path).parent
    if not (before / RECORD).is_file():
        return []
    asks = f"whether training rows ask what the test rows of {before} ask is not known"
    if not isinstance(splits.train, Dataset) or "opening" not in splits.train.column_names:
        return [f"note: {asks}: these rows come without their questions"]
    try:
        tested = _tested(before)
    except (ValueError, OSError, TypeError, KeyError) as error:
        return [f"note: {asks}: {first_line(error)}"]
    known = np.flatnonzero(np.isin(splits.train.with_format("numpy")["opening"][:], tested))
    if len(known):
        raise ValueError(
            f"{len(known)} of {len(splits.train)} training rows ask what the test split of "
            f"{before} asks (the first is training row {known[0]}), so its scores would mean "
            "nothing afterwards: give both trainings the same split_fractions, or take these rows "
            "out"
        )
    return []


def _tested(folder: Path) -> np.ndarray:
    """Returns the keys of the questions of a run's test split, whose data are read again."""
    # earlier versions trained on a row for each answer
    fields = {"loss_on": "completion"} | read_run(folder)["recipe"]
    known = DataArguments.__dataclass_fields__
    args = DataArguments(**{name: value for name, value in fields.items() if name in known})
    return np.array(load_splits(args).test["opening"], dtype=np.int64)
