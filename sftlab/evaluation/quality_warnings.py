"""What a reader must know before believing the scores of eval/quality.py."""

import math
from typing import Any

from sftlab.evaluation.final_number import marked_number
from sftlab.evaluation.intervals import FEW_EFFECTIVE
from sftlab.evaluation.significance import FEW_ROWS
from sftlab.evaluation.text_metrics import LEAST_TOKENS, NAMES, short_references


def warnings(report: dict[str, Any], unchecked: str | None) -> list[str]:
    """Returns what a reader must know before believing the table."""
    found = [unchecked] if unchecked else []
    rows, drawn = report["rows"], report["conversations"]
    likelihoods = report["scores"]["response_perplexity"]
    found += few_row_warnings(report["scores"], drawn, "rows" if drawn == rows else "conversations")
    if (likelihoods["difference"]["interval_95"][0] or 0) > 0:
        found.append("the tuned model's response perplexity is higher than the base model's")
    repeating = report["answers"]["tuned"]["repetitive"]
    if repeating > rows / 2:
        found.append(f"{repeating} of {rows} tuned answers repeat themselves")
    same = report["nats_of_the_token_just_read"]["tuned"]
    following = math.log(report["scores"]["text_perplexity"]["tuned"]["value"])
    if same < following / 2:
        found.append(
            f"the tuned model predicts the token it has just read ({same:.2f} nats) rather than "
            f"the next one ({following:.2f} nats): it seems to be trained on labels that were not "
            "shifted by one, so distrust every score"
        )
    return found


def few_row_warnings(scores: dict[str, dict[str, Any]], number: int, what: str) -> list[str]:
    """Returns which intervals may be too wide or too narrow, of scores over `number` of `what`."""
    found = []
    if number < FEW_ROWS:
        found.append(f"fewer than {FEW_ROWS} {what}: the intervals are wide")
    for name in ("response_perplexity", "text_perplexity"):
        if (rests := scores.get(name, {}).get("effective_rows")) and rests < FEW_EFFECTIVE:
            enough = math.ceil(number * FEW_EFFECTIVE / rests)
            found.append(
                f"{NAMES[name]} rests on about {max(1, round(rests))} of {number} {what}: its "
                f"interval may be too narrow, and about {enough} {what} would do"
            )
    return found


def short_row_warnings(records: list[dict[str, Any]]) -> list[str]:
    """Returns which scores were left out, or say little, because of the references."""
    found, base = [], [record["base"] for record in records]
    without = sum(marked_number(record["reference"]) is None for record in records)
    if without < len(records) / 2 and without:
        found.append(
            f"{NAMES['final_number']} is left out: {without} of {len(records)} references end in "
            "no `#### n` with one number"
        )
    for name, least in LEAST_TOKENS.items():
        short = short_references(base, name)
        said = f"{NAMES[name]} needs references of {least} tokens, and"
        if short == len(base):
            found.append(f"{said} none has them: it is left out, read exact match")
        elif short > len(base) / 2:
            found.append(f"{said} {short} of {len(base)} have fewer: it says little here")
    return found
