"""The test rows of the run that another run went on from: what of its training was lost?"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from sftlab.evaluation.base_and_tuned import finished_run, run_tokenizer
from sftlab.evaluation.held_out import ScoredRows, held_out, questions_of, select
from sftlab.evaluation.start_model import Start

# likelihoods need no room for an answer
_ANY_PROMPT = 2**31


class StartRows(NamedTuple):
    """The rows to score with the start's own tokenizer and template; none where `why_not` says.

    `conversations` [rows] are drawn together. `facts` are for the records.
    """

    scored: ScoredRows | None
    tokenizer: PreTrainedTokenizerBase | None
    conversations: list[int]
    facts: dict[str, Any] | None
    why_not: str | None


def start_rows(start: Start | None, run: dict[str, Any], samples: int) -> StartRows:
    """Returns the first `samples` (0: all) test rows of the run that `run` went on from.

    Rows that ask what `run` was trained or validated on are left out and counted.
    """
    if start is None or start.run is None:
        where = f"the adapter in {start.adapter} is in no run directory" if start else None
        return StartRows(None, None, [], None, where and f"what was lost is not known: {where}")
    try:
        before = finished_run(start.run)
        dataset, tokenizer = held_out(before), run_tokenizer(start.run, before)
        openings = np.array(dataset.rows["opening"])
        known = np.isin(openings, np.fromiter(questions_of(run), np.int64))
        rows = dataset.rows.select(np.flatnonzero(~known))
        recipe = before["recipe"]
        cut = recipe.get("truncation_mode", "keep_start")
        asked = dataset._replace(rows=rows), samples, tokenizer, recipe["max_length"]
        scored = select(*asked, _ANY_PROMPT, cut)
    except (ValueError, OSError) as error:
        why = f"what was lost is not known, since rows of {start.run} cannot be scored: {error}"
        return StartRows(None, None, [], None, why)
    facts = dataset.facts | scored.left_out | {"run": str(start.run), "rows": len(scored.numbers)}
    facts |= {"asked_in_training": int(known.sum())}
    conversations = [row["conversation"] for row in scored.rows]
    return StartRows(scored, tokenizer, conversations, facts, None)


def pairs_known_to_start(start: Start | None, questions: Sequence[int]) -> str | None:
    """Returns a warning where held-out pairs ask what the start was trained or validated on."""
    if start is None or start.run is None:
        return None
    try:
        asked = questions_of(finished_run(start.run))
    except (ValueError, OSError):
        return None  # `start_rows` says why
    known = sum(key in asked for key in questions)
    return (
        f"{known} of {len(questions)} pairs ask what {start.run} was trained or validated on"
        if known
        else None
    )
