"""Preference pairs of a model's own solutions: one with the right final number, one with a wrong.

A data set in the style of GSM8K (Cobbe et al. 2021) says the right number at the end of its
answers, behind `####`.
"""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from sftlab.evaluation.generation import Answer

MARK = "####"
# a minus sign belongs to the number unless something is subtracted
_NUMBER = re.compile(r"(?<![\w.)])-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<![\w.])-?\$?\.\d+")


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


def final_number(text: str) -> Decimal | None:
    """Returns the number behind the last `####`, else the last number of a text; None without one.

    Signs of dollars and commas between thousands are left out.
    """
    _, mark, behind = text.rpartition(MARK)
    numbers = _NUMBER.findall(behind)
    if not numbers:
        return None
    found = numbers[0] if mark else numbers[-1]
    return Decimal(found.replace("$", "").replace(",", ""))


def marked_number(text: str) -> Decimal | None:
    """Returns the number behind the last `####` of a reference; None without one."""
    return final_number(text) if MARK in text else None


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
