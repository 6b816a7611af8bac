"""What `max_length` leaves of the rows."""

import numpy as np
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from sftlab.data.chat_template import first_ids
from sftlab.data.samplers import refuse_few_rows, row_lengths
from sftlab.data.splits import Splits
from sftlab.training.verification import global_batch


def length_facts(trainer: SFTTrainer, rows: int) -> dict[str, int]:
    """Returns the sequences and tokens of one epoch, and what `max_length` did to `rows` rows.

    `cut` rows lost the end of their response, and with it their end token. Under `keep_end` they
    lost their beginning. `dropped` rows had no response token left.
    """
    lengths = row_lengths(trainer.train_dataset)
    at_limit = np.flatnonzero(lengths == trainer.args.max_length)
    eos = trainer.processing_class.eos_token_id
    at_limit_ids = (trainer.train_dataset[int(i)]["input_ids"] for i in at_limit)
    if trainer.args.truncation_mode == "keep_end":
        beginning = first_ids(trainer.processing_class)
        cut = sum(ids[: len(beginning)] != beginning for ids in at_limit_ids)
    else:
        cut = sum(ids[-1] != eos for ids in at_limit_ids)
    return {
        "sequences": len(lengths),
        "tokens": int(lengths.sum()),
        "longest": int(lengths.max()),
        "cut": cut,
        "dropped": rows - len(lengths),
        "left_over_an_epoch": len(lengths) % global_batch(trainer.args),
    }


def length_line(lengths: dict[str, int], args: SFTConfig) -> str:
    """Returns the line that says what `max_length` does to the training rows."""
    cut = "beginning" if args.truncation_mode == "keep_end" else "end"
    return (
        f"training rows: {lengths['sequences']:,} of {lengths['tokens']:,} tokens, the longest "
        f"{lengths['longest']:,}; max_length {args.max_length} cuts the {cut} of "
        f"{lengths['cut']:,} and drops {lengths['dropped']:,}"
    )


def refuse_lost_rows(trainer: SFTTrainer, splits: Splits) -> None:
    """Raise ValueError if `max_length` leaves too few training rows, or no validation row."""
    lost = f"have no response token within max_length {trainer.args.max_length}"
    if isinstance(trainer.train_dataset, Dataset):
        rows, kept = len(splits.train), len(trainer.train_dataset)
        dropped = f" ({rows - kept} of {rows} {lost})" if kept < rows else ""
        refuse_few_rows(kept, global_batch(trainer.args), dropped)
    if trainer.eval_dataset is not None and not len(trainer.eval_dataset):
        raise ValueError(
            f"all {len(splits.validation)} validation rows {lost}: raise it, or leave validation "
            "out (split_fractions)"
        )
