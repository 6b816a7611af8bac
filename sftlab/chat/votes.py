"""Votes on which of two answers is better: a JSONL file, and shares with 95 % intervals."""

import json
import threading
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import binomtest

from sftlab.runs.run_directory import START

# what tuned may be voted against
OTHERS = ("base", START)
CHOICES = (*OTHERS, "tuned", "tie")
_KINDS = {"run": str, "adapter_hash": str | None, "blind": bool}
_WRITING = threading.Lock()


class Votes(NamedTuple):
    """The votes of a file, and for each line that is none a sentence that says why."""

    votes: list[dict[str, Any]]
    broken: list[str]


def cast(path: Path, vote: str, **facts: Any) -> None:
    """Append one vote (base, start, tuned or tie), with the texts and settings it is about.

    The fact `order` names the two models that answered; without it they are base and tuned.

    A last line that a kill cut off stays a line of its own. Raises ValueError for another vote, and
    where the file cannot be written.
    """
    if vote not in CHOICES:
        raise ValueError(f"vote {vote!r}: expected one of {', '.join(CHOICES)}")
    line = json.dumps(
        {"time": datetime.now(UTC).isoformat(timespec="seconds"), "vote": vote, **facts}
    )
    try:
        with _WRITING, path.open("ab+") as file:
            file.seek(0, 2)
            if file.tell():
                file.seek(-1, 2)
                line = line if file.read(1) == b"\n" else f"\n{line}"
            file.write(f"{line}\n".encode())
    except OSError as error:
        raise ValueError(f"the vote was not kept: {path}: {error.strerror}") from error


def read(path: Path) -> Votes:
    """Returns all votes in the file. A line that is no vote is left out, and named."""
    try:
        if path.exists() and not path.is_file():
            # reading a pipe would wait for ever
            return Votes([], [f"{path} is no file: move it aside, or give another --votes"])
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        return Votes([], [f"{path} cannot be read: {error.strerror}"])
    found = Votes([], [])
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.votes.append(_vote(line))
        except (ValueError, RecursionError) as error:
            found.broken.append(f"{path}, line {number} is no vote and is left out: {error}")
    return found


def _vote(line: bytes) -> dict[str, Any]:
    """Returns the vote in a line. Raises ValueError where it holds none."""
    vote = json.loads(line)
    if not isinstance(vote, dict):
        raise ValueError(f"it is a {type(vote).__name__}, expected an object")
    for name, kind in _KINDS.items():
        if name not in vote or not isinstance(vote[name], kind):
            raise ValueError(f"{name} is {str(vote.get(name))[:40]!r}")
    if not isinstance(vote.get("vote"), str) or vote["vote"] not in CHOICES:
        raise ValueError(
            f"vote is {str(vote.get('vote'))[:40]!r}, expected one of {', '.join(CHOICES)}"
        )
    pair = vote.get("order", ["base", "tuned"])
    if not any(pair in ([other, "tuned"], ["tuned", other]) for other in OTHERS):
        raise ValueError(f"order is {str(pair)[:40]!r}, expected tuned and one of base, start")
    if vote["vote"] not in (*pair, "tie"):
        raise ValueError(f"vote is {vote['vote']!r}, and {' and '.join(pair)} answered")
    return vote


def _other(vote: dict[str, Any]) -> str:
    """Returns the side that tuned was voted against."""
    return next(one for one in vote.get("order", OTHERS) if one in OTHERS)


def summary(votes: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Count the votes of each run, pair of models and way of voting (blind or not).

    `against` is what tuned was voted against, base or start, and `other` counts the votes for it.

    The models are told apart by `models`, a hash of base, adapter, template and tokenizer; votes of
    earlier versions have the adapter's hash alone. Returns one row for each. `won` is the share of
    tuned among the votes other than ties, and `interval_95` is Wilson's score interval (1927). Both
    are None where every vote is a tie. The interval takes votes as independent, which many votes of
    one person are not.
    """
    groups: dict[tuple[str, str | None, bool, str], list[str]] = {}
    for vote in votes:
        models = vote.get("models")
        models = models if isinstance(models, str) else vote["adapter_hash"]
        group = (vote["run"], models, vote["blind"], _other(vote))
        groups.setdefault(group, []).append(vote["vote"])
    rows = []
    for (run, models, blind, against), choices in sorted(groups.items(), key=str):
        row: dict[str, Any] = {"run": run, "models": models, "blind": blind, "against": against}
        row |= {"other": choices.count(against)}
        row |= {choice: choices.count(choice) for choice in ("tuned", "tie")}
        decided = row["other"] + row["tuned"]
        test = binomtest(row["tuned"], decided) if decided else None
        row["won"] = row["tuned"] / decided if decided else None
        row["interval_95"] = list(test.proportion_ci(method="wilson")) if test else None
        rows.append(row)
    return rows
