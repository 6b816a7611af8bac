"""Instructions, answers and judges for the tests of eval/alpaca.py."""

import json

ROWS = 40
QUESTIONS = [f"What is the number {i} in words?" for i in range(ROWS)]
RIGHT = {text: f"It is number {i}, right." for i, text in enumerate(QUESTIONS)}


def outputs(path, texts, name="good"):
    path.write_text(
        json.dumps([{"instruction": q, "output": t, "generator": name} for q, t in texts.items()])
    )
    return str(path)


def always_first(question, a, b):
    return "Response A is fine. [RESULT] A"


def perfect(question, a, b):
    """Knows the right answers, and calls two right or two wrong ones a tie."""
    right = [RIGHT[question] == text for text in (a, b)]
    return "[[C]]" if right[0] == right[1] else f"[[{'A' if right[0] else 'B'}]]"


def check_of(report, name):
    return next(row for row in report["sanity_checks"] if row["check"] == name)
