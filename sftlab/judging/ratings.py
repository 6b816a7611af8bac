"""Answers rated one by one on a judge's own scale: ratings, sanity checks of them, and means."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sftlab.evaluation.answer_file import AnswerFile
from sftlab.evaluation.significance import Paired, add_holm, compare
from sftlab.judging.asking import ask, longest_fitting
from sftlab.judging.contradictions import rating_contradicts
from sftlab.judging.judge_formats import JudgeFormat, Messages
from sftlab.judging.judges import Judge
from sftlab.judging.pairwise import mean_of_parsed, parts, rate
from sftlab.judging.sanity_checks import (
    ABOVE,
    CHANCE,
    CONTRADICTIONS,
    UNPARSED_REFUSED,
    at_most,
    surely_above,
)
from sftlab.judging.unparsed import by_kind
from sftlab.runs.run_directory import SIDES
from sftlab.schema import read_content
from sftlab.tables import percent

# published sampling temperatures by category (FastChat, llm_judge); the other categories have 0
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
_SOURCE = "https://github.com/lm-sys/FastChat/tree/main/fastchat/llm_judge/data/mt_bench"


class Question(NamedTuple):
    """A user's two turns. `references` are right answers to them, or None."""

    number: int
    category: str
    turns: list[str]
    references: list[str] | None

    @property
    def temperature(self) -> float:
        """Returns the sampling temperature of its answers."""
        return TEMPERATURES.get(self.category, 0.0)


class Answered(NamedTuple):
    """A question and the answers to its first turn or to both. The last answer is rated."""

    question: Question
    answers: list[str]


Rated = Callable[[Sequence[Answered], str], list[dict[str, Any]]]


def read_questions(questions: Path, references: Path) -> list[Question]:
    """Read MT-Bench's questions, with reference answers to some of them.

    Raises ValueError where a file has another form.
    """
    right = {}
    for number, row in enumerate(_lines(references, "choices"), 1):
        choices = row["choices"]
        turns = choices[0].get("turns") if _is_list(choices, dict) and choices else None
        if not _is_list(turns, str) or len(turns) < 2:
            raise ValueError(
                f"{references}, line {number}: expected choices[0].turns with two answers"
            )
        right[row["question_id"]] = turns
    found = []
    for row in _lines(questions, "turns", "category"):
        turns, category = row["turns"], row["category"]
        if not _is_list(turns, str) or len(turns) != 2 or not isinstance(category, str):
            raise ValueError(f"{questions} has questions of other than two turns and a category")
        found.append(Question(row["question_id"], category, turns, right.get(row["question_id"])))
    if not any(question.references for question in found):
        raise ValueError(
            f"{references} has no answer to any question of {questions}: the judge needs some for "
            "its sanity checks"
        )
    return found


def rate_answers(
    judge: Judge,
    style: JudgeFormat,
    answered: Sequence[Answered],
    title: str,
    file: AnswerFile,
    size: int,
) -> list[dict[str, Any]]:
    """Returns one record per answer, with prompt, judgement and `rating`.

    Where it is None, `unparsed` says why. `contradiction` says that the words are against it.
    A second turn is judged with the first in view. The judge sees reference answers where there
    are some. Answers that do not fit its context are cut in the middle.
    """
    fitted = [_prompt(judge, style, one) for one in answered]
    reads = partial(style.read, "score")
    judged = ask(judge, [prompt for prompt, _ in fitted], file, size, title, reads)
    readings = [reads(judgement.text, judgement.finish) for judgement in judged]
    return [
        {
            "question_id": one.question.number,
            "category": one.question.category,
            "turn": len(one.answers),
            "answers": one.answers,
            "prompt": prompt,
            "judgement": judgement.text,
            "finish": judgement.finish,
            "rating": reading.verdict,
            "unparsed": reading.why,
            "contradiction": rating_contradicts(judgement.text, reading.verdict, style.scale),
            "characters_cut": lost,
        }
        for one, (prompt, lost), judgement, reading in zip(
            answered, fitted, judged, readings, strict=True
        )
    ]


def _prompt(judge: Judge, style: JudgeFormat, answered: Answered) -> tuple[Messages, int]:
    """Returns the prompt that asks for a rating, and the characters cut from the answers."""
    question, answers = answered
    turn = len(answers)
    fields = {f"question_{i + 1}": question.turns[i] for i in range(turn)}
    if question.references:
        fields |= {f"reference_{i + 1}": question.references[i] for i in range(turn)}
    kind = f"turn_{turn}_reference" if question.references else f"turn_{turn}"
    return longest_fitting(
        judge,
        lambda texts: style.messages(kind, **fields, **texts),
        {f"answer_{i + 1}": text for i, text in enumerate(answers)},
    )


def right_over_shuffled(
    rated: Rated, questions: Sequence[Question]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Check that reference answers are rated above reference answers to other questions.

    Returns the check's row and the records behind it. `value` is the share of pairs in which the
    right answer is rated higher; equal ratings count half.
    """
    known = [question for question in questions if question.references]
    others = known[len(known) // 2 :] + known[: len(known) // 2]
    right = rated([Answered(one, one.references[:1]) for one in known], "reference answers")
    wrong = rated(
        [Answered(one, other.references[:1]) for one, other in zip(known, others, strict=True)],
        "shuffled",
    )
    pairs = [(a["rating"], b["rating"]) for a, b in zip(right, wrong, strict=True)]
    scores = [(np.sign(a - b) + 1) / 2 for a, b in pairs if a is not None and b is not None]
    found = rate(int(sum(scores)), len(scores))
    row = {
        "check": "right over shuffled",
        "expected": ABOVE,
        "pairs": len(pairs),
        **found,
    }
    if scores:
        row["value"] = float(np.mean(scores))
    note = f"{scores.count(0.5)} rated alike"
    above = surely_above(row, len(scores))
    note = "; ".join(filter(None, (note, above.get("note"))))
    return row | above | {"note": note}, [*right, *wrong]


def noise_floor(
    one: Sequence[Mapping[str, Any]], two: Sequence[Mapping[str, Any]], scale: tuple[int, int]
) -> dict[str, Any]:
    """Check that two samples of one model are rated alike, on the judge's `scale`.

    Returns the check's row. `value` is the share of pairs whose first sample is rated higher.
    """
    pairs = [(a["rating"], b["rating"]) for a, b in zip(one, two, strict=True)]
    pairs = [pair for pair in pairs if None not in pair]
    higher = sum((np.sign(a - b) + 1) / 2 for a, b in pairs)
    row = {"check": "base against base", "expected": "50 % within chance", "pairs": len(one)}
    row |= rate(int(higher), len(pairs))
    if not pairs:
        return row | {"passed": False, "note": ""}
    sides = (parts(side) for side in zip(*pairs, strict=True))
    apart = compare({"rating": Paired(mean_of_parsed, *sides, *scale)})["rating"]
    low, high = apart["difference"]["interval_95"]
    note = f"ratings differ by {apart['difference']['value']:.2f} [{low:.2f}, {high:.2f}]"
    return row | {
        "value": float(higher / len(pairs)),
        "passed": bool(apart["p_value"] > CHANCE),
        "note": note,
    }


def unparsed(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the share of judgements without a rating, as a row of the sanity checks."""
    row = {
        "check": "unparsed",
        "expected": f"at most {percent(UNPARSED_REFUSED)}",
        "pairs": len(records),
        "note": "",
    }
    row |= rate(sum(record["rating"] is None for record in records), len(records))
    return row | {"passed": row["value"] <= UNPARSED_REFUSED}


def ends(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the share of judgements that were cut off, and the kinds of unparsed ones."""
    cut = rate(sum(record["finish"] == "length" for record in records), len(records))
    kinds = by_kind((record["unparsed"], record["judgement"]) for record in records)
    return {"cut": cut, "unparsed_kinds": kinds}


def contradictions(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the share of ratings that the judge's own words are against, as a row of checks."""
    rated = [record for record in records if record["rating"] is not None]
    found = rate(sum(record["contradiction"] for record in rated), len(rated))
    row = {"check": "contradictions", "expected": f"at most {percent(CONTRADICTIONS)}"}
    return row | {"pairs": len(records)} | found | at_most(CONTRADICTIONS, found["value"])


def mean_ratings(
    records: Mapping[str, Sequence[Mapping[str, Any]]], scale: tuple[int, int]
) -> dict[str, dict[str, Any]]:
    """Returns both sides' mean rating overall, by turn and by category, on the judge's `scale`.

    Each comes with the difference, intervals and p-values. A question's two turns are drawn
    together, because they depend on each other. `overall` is one claim; Holm's correction is over
    the two turns, and over the categories. A group in which a side has no rating is left out.
    """
    groups: dict[str, Callable[[Mapping[str, Any]], bool]] = {"overall": lambda _: True}
    groups |= {f"turn {turn}": lambda one, turn=turn: one["turn"] == turn for turn in (1, 2)}
    categories = dict.fromkeys(record["category"] for record in records["base"])
    groups |= {name: lambda one, name=name: one["category"] == name for name in categories}
    found = {}
    for name, chosen in groups.items():
        sums = []
        for side in SIDES:
            by_question: dict[int, np.ndarray] = {}
            for record in filter(chosen, records[side]):
                number = record["question_id"]
                by_question[number] = (
                    by_question.get(number, np.zeros(2)) + parts([record["rating"]])[0]
                )
            sums.append(np.array([by_question[number] for number in sorted(by_question)]))
        if all(one[:, 1].sum() for one in sums):
            found[name] = compare({name: Paired(mean_of_parsed, *sums, *scale)})[name]
    for family in (["overall"], ["turn 1", "turn 2"], list(categories)):
        add_holm({name: found[name] for name in family if name in found})
    return found


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(one, kind) for one in value)


def _lines(path: Path, *keys: str) -> list[dict[str, Any]]:
    if not path.exists():
        raise ValueError(
            f"no file {str(path)!r}: MT-Bench's question.jsonl and reference_answer are at "
            f"{_SOURCE}"
        )
    lines = read_content(path)
    try:
        rows = [json.loads(line) for line in lines.decode("utf-8").split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON lines: {error}") from error
    needed = {"question_id", *keys}
    if not rows or not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise ValueError(
            f"{path} has lines without question_id or {' or '.join(keys)}: expected MT-Bench's own "
            "form"
        )
    if not all(type(row["question_id"]) in (int, str) for row in rows):
        raise ValueError(f"{path} has a question_id that is neither a number nor a text")
    return rows
