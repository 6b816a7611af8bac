"""Is something wrong with rows as the model gets them? Token ids and labels are looked at."""

from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

MASKED = -100
# rows that a training looks at before its first step
LOOKED_AT = 1000


class RowChecks(NamedTuple):
    """How many of `rows` have a fault, each with the number of the first one (or None).

    `cut_off` rows lose their end token to the cut, `endless` ones have none in the loss anyway.
    `begun_twice` begin with two begin tokens, `without` have no token in the loss, and `repeated`
    have the prompt of an earlier row.
    """

    rows: int
    cut_off: tuple[int, int | None]
    endless: tuple[int, int | None]
    begun_twice: tuple[int, int | None]
    without: tuple[int, int | None]
    repeated: tuple[int, int | None]


def check_rows(
    rows: Iterable[tuple[Sequence[int], Sequence[int]]],
    ends: Collection[int],
    begin: int | None,
    limit: int | None,
) -> RowChecks:
    """Look at the ids and labels of rows, cut to `limit` tokens as they are trained on.

    `ends` are the tokens that may end an answer, `begin` is the one that begins a text.
    """
    found: dict[str, list[int]] = {name: [] for name in RowChecks._fields[1:]}
    prompts: set[tuple[int, ...]] = set()
    number = -1
    for number, (ids, labels) in enumerate(rows):
        first = next((i for i, label in enumerate(labels) if label != MASKED), None)
        prompt = tuple(ids[:first])
        if first is None:
            found["without"].append(number)
        elif first == 0 and len(ids) == limit:
            continue  # a piece of a longer text
        elif not any(label in ends for label in labels[first:]):
            found["cut_off" if len(ids) == limit else "endless"].append(number)
        if begin is not None and list(ids[:2]) == [begin, begin]:
            found["begun_twice"].append(number)
        if prompt in prompts and prompt:
            found["repeated"].append(number)
        prompts.add(prompt)
    counted = {name: (len(hits), hits[0] if hits else None) for name, hits in found.items()}
    return RowChecks(number + 1, **counted)


def end_of_loss(labels: Sequence[int], ends: Collection[int]) -> list[int]:
    """Returns the last answer's end token with what a template writes behind it; [] without one."""
    found: list[int] = []
    for before, label in pairwise([MASKED, *labels]):
        if label in ends:
            found = [label]
        elif label != MASKED and before == MASKED:  # another answer begins
            found = []
        elif label != MASKED and found:
            found.append(label)
    return found


def check_lines(
    checks: RowChecks, limit: int | None, what_rows: str = "training rows"
) -> list[str]:
    """Returns a line for each kind of fault that rows have, and for repeated prompts.

    `what_rows` says what the rows are.
    """
    said = {
        "cut_off": f"lose their end token to max_length {limit}, so they do not teach to stop: "
        "raise it, or leave long rows out",
        "endless": "have no end token in the loss, so they do not teach to stop",
        "begun_twice": "begin with two begin tokens: take one out of the chat template",
        "without": f"have nothing in the loss within max_length {limit}, and are dropped",
        "repeated": "have the prompt of an earlier row",
    }
    lines = []
    for name, what in said.items():
        count, first = getattr(checks, name)
        if count:
            mark = "" if name == "repeated" else "warning: "
            lines.append(
                f"{mark}{count:,} of the first {checks.rows:,} {what_rows} {what} (the first is "
                f"row {first})"
            )
    return lines


def trained_row_lines(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, ends: Collection[int], limit: int | None
) -> list[str]:
    """Returns the lines about the first `LOOKED_AT` rows of the trainer's own data set."""
    first = rows.select(range(min(LOOKED_AT, len(rows))))
    found = ((row["input_ids"], row["labels"]) for row in first)
    return check_lines(check_rows(found, ends, tokenizer.bos_token_id, limit), limit)
