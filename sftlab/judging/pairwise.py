"""Answers compared in pairs: each pair is judged in both orders, and the verdicts are counted."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from sftlab.evaluation.answer_file import AnswerFile
from sftlab.evaluation.intervals import rate_interval
from sftlab.evaluation.significance import Paired, compare, mean
from sftlab.judging.asking import ask, longest_fitting
from sftlab.judging.contradictions import contradicts
from sftlab.judging.judge_formats import JudgeFormat, Messages
from sftlab.judging.judges import Judge
from sftlab.judging.unparsed import by_kind
from sftlab.judging.verdict_parsing import Verdict

# the answer's score by the verdict, for each order
_SAYS = ({"A": 1.0, "B": 0.0, "C": 0.5}, {"A": 0.0, "B": 1.0, "C": 0.5})


class Pair(NamedTuple):
    """One instruction, the answer that is judged, and the reference it is compared with."""

    row: int
    instruction: str
    answer: str
    reference: str


def score(verdicts: Sequence[Verdict]) -> float | None:
    """Returns one score of the two orders' verdicts.

    It is 1 for a win, 0 for a loss, 0.5 for a tie or a disagreement, and None where a verdict is
    unparsed.
    """
    says = [_SAYS[order].get(verdict) for order, verdict in enumerate(verdicts)]
    if None in says:
        return None
    return says[0] if says[0] == says[1] else 0.5


def judge_pairs(
    judge: Judge, style: JudgeFormat, pairs: Sequence[Pair], file: AnswerFile, size: int, title: str
) -> list[dict[str, Any]]:
    """Judge each pair in both orders.

    Returns one record per pair, with the prompts, judgements, verdicts, contradictions and ends
    (`finish`) of both orders, and its `score`. `unparsed` says why an order has no verdict.
    """
    orders = (("answer", "reference"), ("reference", "answer"))
    fitted = [_prompt(judge, style, pair, *order) for pair in pairs for order in orders]
    prompts, cut = [prompt for prompt, _ in fitted], [lost for _, lost in fitted]
    judged = ask(judge, prompts, file, size, title, partial(style.read, "pair"))
    records = []
    for place, pair in enumerate(pairs):
        both = slice(2 * place, 2 * place + 2)
        texts = [judgement.text for judgement in judged[both]]
        readings = [style.read("pair", one.text, one.finish) for one in judged[both]]
        verdicts = [reading.verdict for reading in readings]
        pairs_of_words = zip(texts, verdicts, strict=True)
        records.append(
            {
                **pair._asdict(),
                "prompts": prompts[both],
                "judgements": texts,
                "finish": [judgement.finish for judgement in judged[both]],
                "verdicts": verdicts,
                "unparsed": [reading.why for reading in readings],
                "contradictions": [contradicts(text, verdict) for text, verdict in pairs_of_words],
                "characters_cut": max(cut[both]),
                "score": score(verdicts),
            }
        )
    return records


def _prompt(judge: Judge, style: JudgeFormat, pair: Pair, a: str, b: str) -> tuple[Messages, int]:
    """Returns the prompt that shows `a` before `b` (answer, reference), and the characters cut."""

    def build(kept: Mapping[str, str]) -> Messages:
        return style.messages(
            "pair", instruction=pair.instruction, answer_a=kept[a], answer_b=kept[b]
        )

    texts = {"answer": pair.answer, "reference": pair.reference}
    return longest_fitting(judge, build, texts)


def rate(count: int, number: int) -> dict[str, Any]:
    """Returns `count` of `number` as a share with its score interval.

    The value is None where `number` is 0.
    """
    if not number:
        return {"value": None, "interval_95": [None, None]}
    return {"value": count / number, "interval_95": rate_interval(count, number)}


def parts(scores: Sequence[float | None]) -> np.ndarray:
    """Returns scores as parts [rows, 2], whose `mean` leaves out unparsed ones (None)."""
    return np.array(
        [(0.0, 0.0) if one is None else (one, 1.0) for one in scores], dtype=float
    ).reshape(-1, 2)


def mean_of_parsed(sums: np.ndarray) -> np.ndarray:
    """Returns `mean` of parts, or 0 for a resample in which nothing is parsed."""
    return mean(np.where(sums[..., 1:] > 0, sums, (0.0, 1.0)))


def win_rates(base: Sequence[float | None] | None, tuned: Sequence[float | None]) -> dict[str, Any]:
    """Returns both models' win rates in per cent, their difference, 95 % intervals and p-value.

    `base` is None where base is the reference: its rate is 50 by construction, and the difference
    has tuned's interval.
    """
    halves = [None if one is None else 0.5 for one in tuned]
    sides = [100 * parts(one) / (1, 100) for one in (halves if base is None else base, tuned)]
    found = compare({"win_rate": Paired(mean_of_parsed, *sides, 0.0, 100.0)})["win_rate"]
    if base is None:
        found["base"]["interval_95"] = [50.0, 50.0]
        found["difference"]["interval_95"] = [end - 50 for end in found["tuned"]["interval_95"]]
    return found


def tally(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Count what a judge did with pairs.

    Returns wins, losses and ties, the share of unparsed verdicts and their kinds, the share of
    judgements that were cut off, the agreement of the two orders, the preference for the first
    answer, and contradictions.
    """
    scores = [record["score"] for record in records]
    parsed = [record for record in records if record["score"] is not None]
    verdicts = [verdict for record in records for verdict in record["verdicts"]]
    decided = [verdict for verdict in verdicts if verdict in ("A", "B")]
    # alpaca-eval's annotators choose which answer comes first and do not tell
    first = [] if any("annotation" in record for record in records) else decided
    ends = [end for record in records for end in record.get("finish", [])]
    kinds = by_kind(
        pair
        for record in records
        for pair in zip(record.get("unparsed", []), record.get("judgements", []), strict=False)
    )
    agreeing = sum(says_the_same(record["verdicts"]) for record in parsed)
    contradictions = sum(sum(record["contradictions"]) for record in records)
    return {
        "pairs": len(records),
        "wins": scores.count(1.0),
        "losses": scores.count(0.0),
        "ties": rate(scores.count(0.5), len(parsed)),
        "unparsed": rate(verdicts.count(None), len(verdicts)),
        "unparsed_kinds": kinds,
        "cut": rate(ends.count("length"), len(ends)),
        "pairs_unparsed": scores.count(None),
        "orders_agree": rate(agreeing, len(parsed)),
        "first_preferred": rate(first.count("A"), len(first)),
        "contradictions": rate(contradictions, len(decided)),
        "contradicting_rows": [
            record["row"] for record in records if any(record["contradictions"])
        ],
        "pairs_cut": sum(record["characters_cut"] > 0 for record in records),
        "empty_answers": sum(not record["answer"].strip() for record in records),
    }


def says_the_same(verdicts: Sequence[Verdict]) -> bool:
    """Whether the two orders' verdicts name the same answer, or both say tie."""
    return _SAYS[0].get(verdicts[0]) == _SAYS[1].get(verdicts[1])
