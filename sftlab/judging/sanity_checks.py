"""Sanity checks of a judge: its verdicts on pairs whose right verdict is known."""

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

from scipy.stats import binomtest

from sftlab.judging.pairwise import Pair, rate, tally
from sftlab.tables import percent

# A good answer must beat an answer to another instruction this often. The check passes where the
# whole interval is above it, fails where it is below, and asks for more pairs between.
OVER_SHUFFLED = 0.85
# shares of unparsed judgements above which no score is given, and above which a warning is
UNPARSED_REFUSED, UNPARSED_SAID = 0.05, 0.01
CONTRADICTIONS = 0.05
# Two samples of one model win and lose by chance. A split less likely than this fails.
CHANCE = 0.01


def shuffled(pairs: Sequence[Pair]) -> list[Pair]:
    """Returns pairs of each answer with the answer to another instruction, half the list on."""
    step = max(1, len(pairs) // 2)
    others = [pairs[(place + step) % len(pairs)] for place in range(len(pairs))]
    return [
        pair._replace(reference=other.answer) for pair, other in zip(pairs, others, strict=True)
    ]


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """Returns at most `count` of the items, evenly spread."""
    count = min(count, len(items))
    return [items[place * len(items) // count] for place in range(count)]


ABOVE = f"interval above {percent(OVER_SHUFFLED)}"


def surely_above(row: Mapping[str, Any], pairs: int) -> dict[str, Any]:
    """Returns whether the whole interval of a check's share is above OVER_SHUFFLED.

    `passed` is None where `pairs` were too few to say; the note then says how many it takes.
    """
    value, (low, high) = row["value"], row["interval_95"]
    if value is None or high < OVER_SHUFFLED:
        return {"passed": False}
    if low >= OVER_SHUFFLED:
        return {"passed": True}
    # Wilson's interval ends at the bound b where (value - b)^2 = z^2 b (1 - b) / n
    spare, variance = value - OVER_SHUFFLED, OVER_SHUFFLED * (1 - OVER_SHUFFLED)
    takes = f"it takes about {ceil(1.96**2 * variance / spare**2)}" if spare > 0.01 else "by far"
    return {"passed": None, "note": f"too few of {pairs} pairs, {takes} (--sanity_checks)"}


def at_most(limit: float, share: float | None) -> dict[str, Any]:
    """Returns `passed` of a share that must not be larger, and a note where there is none."""
    if share is None:
        return {"passed": None, "note": "no judgement could be read"}
    return {"passed": share <= limit, "note": ""}


class SanityChecks:
    """Runs sanity checks and collects a row of each: what was expected, what was found, passed.

    `judged` takes pairs and a title and returns records, as `judge_pairs` does.
    """

    def __init__(self, judged: Callable[[Sequence[Pair], str], list[dict[str, Any]]]) -> None:
        self.judged = judged
        self.rows: list[dict[str, Any]] = []
        self.records: list[dict[str, Any]] = []

    def same_answer(self, pairs: Sequence[Pair]) -> None:
        """Judge an answer against itself.

        It wins half the time after the swap, by construction. The note says how often the judge
        prefers the first answer.
        """
        twice = [pair._replace(reference=pair.answer) for pair in pairs]
        found = tally(self._judged("same answer twice", twice))
        row = self._add("same answer twice", "50 % after the swap", found)
        first = found["first_preferred"]["value"]
        row["note"] = (
            "no preference" if first is None else f"the first preferred in {percent(first)}"
        )

    def over_shuffled(self, pairs: Sequence[Pair]) -> None:
        """Judge good answers against answers to other instructions."""
        found = tally(self._judged("good over shuffled", shuffled(pairs)))
        row = self._add("good over shuffled", ABOVE, found)
        row |= surely_above(row, found["pairs"] - found["pairs_unparsed"])

    def noise_floor(self, pairs: Sequence[Pair]) -> None:
        """Judge two samples of one model against each other. Either wins by chance."""
        found = tally(self._judged("base against base", pairs))
        row = self._add("base against base", "50 % within chance", found)
        decided = found["wins"] + found["losses"]
        by_chance = not decided or binomtest(found["wins"], decided).pvalue > CHANCE
        row["passed"] = bool(row["passed"] and by_chance)
        row["note"] = f"{found['wins']} won, {found['losses']} lost"

    def agreement(self, pairs: Sequence[Pair], preferred: Sequence[bool], whose: str) -> None:
        """Check that the judge prefers what another judge preferred. A tie counts half.

        `preferred` is True where that judge preferred the answer to the reference. The note counts
        the two kinds of pairs apart, because one model may win nearly always.
        """
        records = self._judged(f"agreement with {whose}", pairs)
        row = self._add(f"agreement with {whose}", "over 50 %", tally(records))
        known = [
            (r["score"], wins)
            for r, wins in zip(records, preferred, strict=True)
            if r["score"] is not None
        ]
        agreed = {
            kind: [1 - abs(value - kind) for value, wins in known if wins is kind]
            for kind in (False, True)
        }
        together = sum(map(sum, agreed.values()))
        row |= rate(int(together), len(known))
        row["value"] = together / len(known) if known else None
        row["passed"] = bool(known) and row["interval_95"][0] > 0.5
        names = {False: "reference", True: "answer"}
        row["note"] = ", ".join(
            f"{sum(agreed[kind]):g} of {len(agreed[kind])} where the {names[kind]} won"
            for kind in agreed
        )

    def behaviour(self, records: Sequence[dict[str, Any]]) -> None:
        """Check that judgements hold a verdict, and none that contradicts its own words.

        All judgements of the earlier checks count, and `records`.
        """
        found = tally([*self.records, *records])
        for what, limit in (("unparsed", UNPARSED_REFUSED), ("contradictions", CONTRADICTIONS)):
            row = {"check": what, "expected": f"at most {percent(limit)}", "pairs": found["pairs"]}
            self.rows.append(row | found[what] | at_most(limit, found[what]["value"]))

    @property
    def fit(self) -> bool:
        """Whether the judge failed none of the checks."""
        return all(row["passed"] is not False for row in self.rows)

    def _judged(self, name: str, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
        records = self.judged(pairs, name)
        self.records += [{"check": name, **record} for record in records]
        return records

    def _add(self, name: str, expected: str, found: dict[str, Any]) -> dict[str, Any]:
        parsed = found["pairs"] - found["pairs_unparsed"]
        ties = parsed - found["wins"] - found["losses"]
        share = rate(found["wins"] + ties // 2, parsed)
        if parsed:
            share["value"] = (found["wins"] + ties / 2) / parsed
        row = {
            "check": name,
            "expected": expected,
            "pairs": found["pairs"],
            **share,
            "passed": parsed > 0,
            "note": "",
        }
        self.rows.append(row)
        return row
