"""Preference pairs of the demo's world: right against wrong answers, short against rambling."""

from collections.abc import Mapping, Sequence
from random import Random

RAMBLE = (
    "Let me think about it.",
    "That is a good thing to ask.",
    "There is much to say here.",
    "I hope that this helps you.",
)


def preference_rows(rows: Sequence[Mapping[str, str]], seed: int) -> list[dict[str, str]]:
    """Returns a pair for each instruction row: its response is chosen.

    The rejected answer is in turn that of another row of the same kind, which is wrong, and the
    same answer amid sentences that say nothing.
    """
    rng, by_kind = Random(seed), {}
    for row in rows:
        by_kind.setdefault(_kind(row), []).append(row["response"])
    return [
        {
            "prompt": _prompt(row),
            "chosen": row["response"],
            "rejected": _wrong(row, by_kind[_kind(row)], rng) if n % 2 else _rambling(row, rng),
        }
        for n, row in enumerate(rows)
    ]


def _kind(row: Mapping[str, str]) -> str:
    """Returns what answers of one kind have in common: their first three words."""
    return " ".join(row["response"].split()[:3])


def _prompt(row: Mapping[str, str]) -> str:
    # as an instruction row with a context becomes one message (sftlab/data/formats.py)
    context = row["context"]
    return f"{row['instruction']}\n\n### Context:\n{context}" if context else row["instruction"]


def _wrong(row: Mapping[str, str], answers: Sequence[str], rng: Random) -> str:
    others = [one for one in dict.fromkeys(answers) if one != row["response"]]
    return rng.choice(others) if others else f"It is not so. {row['response']}"


def _rambling(row: Mapping[str, str], rng: Random) -> str:
    first, second = rng.sample(RAMBLE, 2)
    return f"{first} {row['response']} {second}"
