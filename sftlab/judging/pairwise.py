"""Answers compared in pairs:

each pair judged in both orders, what follows from the two verdicts, and how often.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest

from sftlab.evaluation.answer_file import AnswerFile
from sftlab.evaluation.significance import Paired, compare, mean
from sftlab.judging.judges import JudgeFormat, Judge, ask, longest_fitting
from sftlab.judging.verdict_parsing import Verdict, contradicts

ORDERS = ("answer first", "reference first")
# what each order's verdict says of the answer
_SAYS = ({"A": 1.0, "B": 0.0, "C": 0.5}, {"A": 0.0, "B": 1.0, "C": 0.5})


class Pair(NamedTuple):
    """One instruction with the answer that is judged and the reference that it is compared with."""

    row: int
    instruction: str
    answer: str
    reference: str


def score(verdicts: Sequence[Verdict]) -> float | None:
    """The verdicts of the two orders as one:

    1 won, 0 lost, 0.5 a tie or a disagreement, None where one is unparsed.
    """
    says = [_SAYS[order].get(verdict) for order, verdict in enumerate(verdicts)]
    if None in says:
        return None
    return says[0] if says[0] == says[1] else 0.5


def judge_pairs(
    judge: Judge, style: JudgeFormat, pairs: Sequence[Pair], file: AnswerFile, size: int, title: str
) -> list[dict[str, Any]]:
    """One record a pair: prompts, judgements, verdicts and contradictions of both orders, and its
    `score`.
    """
    prompts, cut = [], []
    for pair in pairs:
        texts = {"answer": pair.answer, "reference": pair.reference}
        for a, b in (("answer", "reference"), ("reference", "answer")):

            def build(
                kept: Mapping[str, str], a: str = a, b: str = b, instruction: str = pair.instruction
            ) -> list:
                return style.messages(
                    "pair", instruction=instruction, answer_a=kept[a], answer_b=kept[b]
                )

            prompt, lost = longest_fitting(judge, build, texts)
            prompts.append(prompt)
            cut.append(lost)
    judged = ask(judge, prompts, file, size, title)
    records = []
    for place, pair in enumerate(pairs):
        both = slice(2 * place, 2 * place + 2)
        texts = [judgement.text for judgement in judged[both]]
        verdicts = [style.read("pair", text) for text in texts]
        record = {
            **pair._asdict(),
            "prompts": prompts[both],
            "judgements": texts,
            "verdicts": verdicts,
        }
        record |= {
            "contradictions": [
                contradicts(text, v) for text, v in zip(texts, verdicts, strict=True)
            ]
        }
        record |= {"characters_cut": max(cut[both]), "score": score(verdicts)}
        records.append(record)
    return records


def rate(count: int, number: int) -> dict[str, Any]:
    """A share of `number` with Wilson's score interval (1927).

    No value where there is nothing to share.
    """
    if not number:
        return {"value": None, "interval_95": [None, None]}
    interval = binomtest(count, number).proportion_ci(method="wilson")
    return {"value": count / number, "interval_95": [float(interval.low), float(interval.high)]}


def parts(scores: Sequence[float | None]) -> np.ndarray:
    """Scores (None: unparsed) as the parts [rows, 2] whose `mean` is that of the parsed ones."""
    return np.array(
        [(0.0, 0.0) if one is None else (one, 1.0) for one in scores], dtype=float
    ).reshape(-1, 2)


def mean_of_parsed(sums: np.ndarray) -> np.ndarray:
    """`mean`, but 0 of a resample in which nothing is parsed."""
    return mean(np.where(sums[..., 1:] > 0, sums, (0.0, 1.0)))


def win_rates(base: Sequence[float | None], tuned: Sequence[float | None]) -> dict[str, Any]:
    """Win rates in per cent of both models, their difference, 95 % intervals and p-value (paired
    bootstrap over rows).

    Where all rows of a model say the same a bootstrap would claim certainty: its interval is
    Wilson's then.
    """
    found = compare(
        {
            "win_rate": Paired(
                mean_of_parsed, *(100 * parts(one) / (1, 100) for one in (base, tuned))
            )
        }
    )
    found = found["win_rate"]
    for side, scores in (("base", base), ("tuned", tuned)):
        parsed = [one for one in scores if one is not None]
        if len(set(parsed)) == 1 and parsed[0] in (0, 1):
            ends = rate(int(sum(parsed)), len(parsed))["interval_95"]
            found[side]["interval_95"] = [100 * end for end in ends]
    return found


def tally(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a judge did with pairs:

    ties, unparsed, agreement of the two orders, preference for the first answer.
    """
    scores = [record["score"] for record in records]
    parsed = [record for record in records if record["score"] is not None]
    verdicts = [verdict for record in records for verdict in record["verdicts"]]
    decided = [verdict for verdict in verdicts if verdict in ("A", "B")]
    # alpaca-eval's annotators draw which answer they show first, and do not say it
    first = [] if any("annotation" in record for record in records) else decided
    agreeing = sum(says_the_same(record["verdicts"]) for record in parsed)
    contradictions = sum(sum(record["contradictions"]) for record in records)
    return {
        "pairs": len(records),
        "wins": scores.count(1.0),
        "losses": scores.count(0.0),
        "ties": rate(scores.count(0.5), len(parsed)),
        "unparsed": rate(verdicts.count(None), len(verdicts)),
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
    """Whether the two orders' verdicts name the same answer, or both a tie."""
    return _SAYS[0].get(verdicts[0]) == _SAYS[1].get(verdicts[1])
