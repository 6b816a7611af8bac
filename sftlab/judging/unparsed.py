"""What is said of judgements without a verdict, and of those that were cut off."""

from collections.abc import Iterable, Mapping
from typing import Any

from sftlab.judging.verdict_parsing import NO_JUDGEMENT
from sftlab.tables import percent

# A share of judgements that were cut off above which it is said on top.
CUT_SAID = 0.01


def by_kind(judgements: Iterable[tuple[str | None, str]]) -> dict[str, dict[str, Any]]:
    """Returns the number of unparsed judgements of each kind, with the end of one text.

    `judgements` are pairs of the kind (None: parsed) and the text.
    """
    found: dict[str, dict[str, Any]] = {}
    for why, text in judgements:
        if why is not None:
            one = found.setdefault(why, {"count": 0, "example": _ending(text)})
            one["count"] += 1
    return found


def _ending(text: str) -> str:
    """Returns the last 120 characters on a line: that is where a verdict is expected."""
    words = " ".join((text or "").split())
    return words if len(words) <= 120 else f"...{words[-117:]}"


def unparsed_lines(kinds: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns a line for each kind, the most frequent first."""
    ordered = sorted(kinds.items(), key=lambda one: -one[1]["count"])
    return [
        f"unparsed, {why}: {one['count']}, for instance: {one['example'] or '(nothing)'}"
        for why, one in ordered
    ]


def asked_again(judge: Mapping[str, Any], judged: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns what follows on a refused result where the same command asks a server again.

    `judge` holds the judge's facts, `judged` each side's `unparsed_kinds`.
    """
    kinds = {kind for side in judged.values() for kind in side["unparsed_kinds"]}
    if "server" not in judge or kinds.isdisjoint(NO_JUDGEMENT):
        return ""
    return "; what the server gave that is no judgement is asked again by the same command"


def cut_warning(share: float | None, whose: str, most: int | None) -> list[str]:
    """Returns a warning where more than 1 % of the judgements were cut off.

    `share` is None where the judge does not tell. `most` is the longest judgement in tokens.
    """
    if share is None or share <= CUT_SAID:
        return []
    tokens = f" of {most}" if most else ""
    return [
        f"{percent(share)} of the judgements of {whose} were cut off at --judge_max_new_tokens"
        f"{tokens}: give the judge more"
    ]
