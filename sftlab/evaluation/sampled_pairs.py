"""Preference pairs of a model's own solutions: one with the right final number, one with a wrong.

A data set in the style of GSM8K (Cobbe et al. 2021) says the right number at the end of its
answers, behind `####`.
"""

from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from sftlab.evaluation.final_number import final_number
from sftlab.evaluation.generation import Answer


class Question(NamedTuple):
    """A question's messages, its right final number, and its tools if it has some."""

    prompt: list[dict[str, Any]]
    number: Decimal
    tools: Any = None


class Solved(NamedTuple):
    """What became of one question's solutions. Texts are distinct, in the order of sampling.

    `unfinished` counts those that are empty or were cut off, and so are neither right nor wrong.
    """

    right: list[str]
    wrong: list[str]
    right_solutions: int
    wrong_solutions: int
    unfinished: int


def solved(answers: Sequence[Answer], number: Decimal) -> Solved:
    """Mark solutions as right or wrong by their final number. One without a number is wrong."""
    finished = [one.text for one in answers if one.text and one.finish == "stop"]
    marked = [(text, final_number(text) == number) for text in finished]
    right = [text for text, is_right in marked if is_right]
    wrong = [text for text, is_right in marked if not is_right]
    kept = [*dict.fromkeys(right)], [*dict.fromkeys(wrong)]
    return Solved(*kept, len(right), len(wrong), len(answers) - len(finished))


def pairs_of(question: Question, found: Solved, most: int) -> list[dict[str, Any]]:
    """Returns at most `most` pairs of a question, each solution in one pair alone."""
    tools = {"tools": question.tools} if question.tools else {}
    return [
        {"prompt": question.prompt, "chosen": _said(right), "rejected": _said(wrong)} | tools
        for right, wrong in list(zip(found.right, found.wrong, strict=False))[:most]
    ]


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def counts(found: Sequence[Solved]) -> dict[str, int]:
    """Returns how many questions and solutions are of each kind."""
    neither = sum(not (one.right or one.wrong) for one in found)
    return {
        "questions": len(found),
        "questions_with_both": sum(bool(one.right and one.wrong) for one in found),
        "questions_all_right": sum(bool(one.right and not one.wrong) for one in found),
        "questions_all_wrong": sum(bool(one.wrong and not one.right) for one in found),
        "questions_without_a_finished_solution": neither,
        "solutions_right": sum(one.right_solutions for one in found),
        "solutions_wrong": sum(one.wrong_solutions for one in found),
        "solutions_unfinished": sum(one.unfinished for one in found),
    }
