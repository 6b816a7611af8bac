"""MT-Bench's conversations: both models answer two turns, the second with the first in view."""

from collections.abc import Sequence

from sftlab.data.formats import Message
from sftlab.evaluation.generation import Answer, Sampling
from sftlab.judging.model_answers import Contestants
from sftlab.judging.ratings import Answered, Question


def conversation(question: Question, answers: Sequence[Answer], turn: int) -> list[Message]:
    """Returns the messages up to and with the question of a turn (0 or 1)."""
    messages = []
    for i in range(turn):
        messages += [
            {"role": "user", "content": question.turns[i]},
            {"role": "assistant", "content": answers[i].text},
        ]
    return [*messages, {"role": "user", "content": question.turns[turn]}]


def both_turns(
    contestants: Contestants, side: str, questions: Sequence[Question], sampling: Sampling
) -> list[list[Answer]]:
    """Returns one side's answers to both turns of each question, at the question's temperature."""
    found: list[list[Answer]] = [[] for _ in questions]
    for turn in (0, 1):
        for temperature in sorted({one.temperature for one in questions}):
            chosen = [i for i, one in enumerate(questions) if one.temperature == temperature]
            asked = [conversation(questions[i], found[i], turn) for i in chosen]
            title = f"{side}, turn {turn + 1}, temperature {temperature}"
            drawn = Sampling(sampling.max_new_tokens, temperature, seed=sampling.seed)
            answers = contestants.answers(side, asked, drawn, title)
            for i, answer in zip(chosen, answers, strict=True):
                found[i].append(answer)
    return found


def draw_twice(
    contestants: Contestants, questions: Sequence[Question], sampling: Sampling
) -> list[list[Answered]]:
    """Returns two sampled answers of the base model to the first turn of each question.

    The questions must have temperatures above 0.
    """
    found: list[list[Answered]] = [[], []]
    for temperature in sorted({one.temperature for one in questions}):
        chosen = [one for one in questions if one.temperature == temperature]
        drawn = Sampling(sampling.max_new_tokens, temperature, seed=sampling.seed)
        asked = [conversation(one, [], 0) for one in chosen]
        for place, answers in enumerate(contestants.draws(asked, drawn, "base answers, sampled")):
            found[place] += [
                Answered(one, [answer.text]) for one, answer in zip(chosen, answers, strict=True)
            ]
    return found
