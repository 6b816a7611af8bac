"""Votes on which of two answers is better: a JSONL file, and shares with 95 % intervals."""

import json
import threading
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

CHOICES = ("base", "tuned", "tie")
_WRITING = threading.Lock()


def cast(path: Path, vote: str, **facts: Any) -> None:
    """Append one vote (base, tuned or tie), with the texts and settings it is about."""
    if vote not in CHOICES:
        raise ValueError(f"vote {vote!r}: expected one of {', '.join(CHOICES)}")
    line = json.dumps(
        {"time": datetime.now(UTC).isoformat(timespec="seconds"), "vote": vote, **facts}
    )
    with _WRITING, path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Read all votes in the file. Raises ValueError with the first line that is none."""
    votes = []
    for number, line in enumerate(
        path.read_text(encoding="utf-8").splitlines() if path.is_file() else [], 1
    ):
        try:
            vote = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(vote, dict) or {"run", "adapter_hash", "blind", "vote"} - vote.keys():
            raise ValueError(
                f"{path}, line {number} is no vote: expected an object with run, adapter_hash, "
                "blind, vote"
            )
        votes.append(vote)
    return votes


def summary(votes: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Count the votes of each run, adapter and way of voting (blind or not).

    Returns one row for each. `won` is the share of tuned among the votes other than ties, and
    `interval_95` is Wilson's score interval (1927). Both are None where every vote is a tie. The
    interval takes votes as independent, which many votes of one person are not.
    """
    groups: dict[tuple[str, str | None, bool], list[str]] = {}
    for vote in votes:
        groups.setdefault((vote["run"], vote["adapter_hash"], vote["blind"]), []).append(
            vote["vote"]
        )
    rows = []
    for (run, adapter, blind), choices in sorted(groups.items(), key=str):
        row: dict[str, Any] = {"run": run, "adapter_hash": adapter, "blind": blind}
        row |= {choice: choices.count(choice) for choice in CHOICES}
        decided = row["base"] + row["tuned"]
        test = binomtest(row["tuned"], decided) if decided else None
        row["won"] = row["tuned"] / decided if decided else None
        row["interval_95"] = list(test.proportion_ci(method="wilson")) if test else None
        rows.append(row)
    return rows
