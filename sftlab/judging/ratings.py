"""Answers rated one by one on a judge's own scale:

MT-Bench's two turns, canaries of ratings, and means.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sftlab.evaluation.answer_file import AnswerFile
from sftlab.evaluation.significance import Paired, add_holm, compare
from sftlab.judging.judges import JudgeFormat, Judge, ask, longest_fitting
from sftlab.judging.pairwise import mean_of_parsed, parts, rate
from sftlab.judging.sanity_checks import CHANCE, OVER_SHUFFLED, UNPARSED_REFUSED
from sftlab.runs.run_directory import SIDES
from sftlab.tables import percent

# Sampling temperatures of the answers, as published (FastChat, llm_judge); 0 in the other
# categories.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
_SOURCE = "https://github.com/lm-sys/FastChat/tree/main/fastchat/llm_judge/data/mt_bench"


class Question(NamedTuple):
    """Two turns of a user; `references` are right answers to them, where there are any."""

    number: int
    category: str
    turns: list[str]
    references: list[str] | None

    @property
    def temperature(self) -> float:
        """At which it is answered."""
        return TEMPERATURES.get(self.category, 0.0)


class Answered(NamedTuple):
    """A question and the answers to its first turn, or to both: the last one is rated."""

    question: Question
    answers: list[str]


Rated = Callable[[Sequence[Answered], str], list[dict[str, Any]]]


def read_questions(questions: Path, references: Path) -> list[Question]:
    """MT-Bench's questions with the reference answers to some of them.

    ValueError says what is wrong with a file.
    """
    right = {
        row["question_id"]: row["choices"][0]["turns"] for row in _lines(references, "choices")
    }
    found = [
        Question(row["question_id"], row["category"], row["turns"], right.get(row["question_id"]))
        for row in _lines(questions, "turns", "category")
    ]
    if not all(len(question.turns) == 2 for question in found):
        raise ValueError(f"{questions} has questions of other than two turns")
    if not any(question.references for question in found):
        raise ValueError(
            f"{references} has no answer to any question of {questions}: the judge could not be "
            "tried"
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
    """One record an answer: prompt, judgement and `rating` (None: unparsed).

    A second turn is judged with the first.

    Reference answers are shown where there are some. What does not fit the judge is cut from the
    answers' middle.
    """
    prompts, cut = [], []
    for question, answers in answered:
        turn = len(answers)
        fields = {f"question_{i + 1}": question.turns[i] for i in range(turn)}
        if question.references:
            fields |= {f"reference_{i + 1}": question.references[i] for i in range(turn)}
        kind = f"turn_{turn}_reference" if question.references else f"turn_{turn}"

        def build(
            texts: Mapping[str, str], kind: str = kind, fields: Mapping[str, str] = fields
        ) -> list:
            return style.messages(kind, **fields, **texts)

        prompt, lost = longest_fitting(
            judge, build, {f"answer_{i + 1}": text for i, text in enumerate(answers)}
        )
        prompts.append(prompt)
        cut.append(lost)
    judged = ask(judge, prompts, file, size, title)
    return [
        {
            "question_id": one.question.number,
            "category": one.question.category,
            "turn": len(one.answers),
            "answers": one.answers,
            "prompt": prompt,
            "judgement": judgement.text,
            "rating": style.read("score", judgement.text),
            "characters_cut": lost,
        }
        for one, prompt, judgement, lost in zip(answered, prompts, judged, cut, strict=True)
    ]


def right_over_shuffled(
    rated: Rated, questions: Sequence[Question]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The canary of reference answers against those to other questions:

    how often the right one is rated higher.
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
        "canary": "right over shuffled",
        "expected": f"over {percent(OVER_SHUFFLED)}",
        "pairs": len(pairs),
        **found,
    }
    if scores:
        row["value"] = float(np.mean(scores))
    note = f"{scores.count(0.5)} rated alike"
    passed = bool(scores) and found["interval_95"][1] >= OVER_SHUFFLED
    return row | {"passed": passed, "note": note}, [*right, *wrong]


def noise_floor(
    one: Sequence[Mapping[str, Any]], two: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The canary of one model's answers drawn twice:

    `value` is the share of pairs whose first is rated higher.
    """
    pairs = [(a["rating"], b["rating"]) for a, b in zip(one, two, strict=True)]
    pairs = [pair for pair in pairs if None not in pair]
    higher = sum((np.sign(a - b) + 1) / 2 for a, b in pairs)
    row = {"canary": "base against base", "expected": "50 % within chance", "pairs": len(one)}
    row |= rate(int(higher), len(pairs))
    if not pairs:
        return row | {"passed": False, "note": ""}
    apart = compare(
        {"rating": Paired(mean_of_parsed, *(parts(side) for side in zip(*pairs, strict=True)))}
    )["rating"]
    low, high = apart["difference"]["interval_95"]
    note = f"ratings differ by {apart['difference']['value']:.2f} [{low:.2f}, {high:.2f}]"
    return row | {
        "value": float(higher / len(pairs)),
        "passed": apart["p_value"] > CHANCE,
        "note": note,
    }


def unparsed(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The share of ratings without a verdict, as a canary."""
    row = {
        "canary": "unparsed",
        "expected": f"at most {percent(UNPARSED_REFUSED)}",
        "pairs": len(records),
        "note": "",
    }
    row |= rate(sum(record["rating"] is None for record in records), len(records))
    return row | {"passed": row["value"] <= UNPARSED_REFUSED}


def mean_ratings(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Mean rating of both sides overall, by turn and by category.

    Difference, intervals and p-values (after Holm).

    A question's two turns are drawn together: they hang together. A group in which a side has no
    rating is left out.
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
            found[name] = compare({name: Paired(mean_of_parsed, *sums)})[name]
    add_holm(found)
    return found


def _lines(path: Path, *keys: str) -> list[dict[str, Any]]:
    try:
        rows = [
            json.loads(line)
            for line in path.read_text(encoding="utf-8").split("\n")
            if line.strip()
        ]
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} not found: MT-Bench's question.jsonl and reference_answer are at {_SOURCE}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON lines: {error}") from error
    needed = {"question_id", *keys}
    if not rows or not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise ValueError(
            f"{path} has lines without question_id or {' or '.join(keys)}: expected MT-Bench's own "
            "form"
        )
    return rows
