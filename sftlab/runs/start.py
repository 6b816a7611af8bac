"""How a run starts: anew, or from a checkpoint, and what the interruption before it cost."""

import json
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sftlab.runs import progress


@dataclass
class Start:
    """How a run starts, as found before anything is written.

    `checkpoint` is the one that it continues from, `must_match` what must be the same, `says` what
    the user should know. `at_stake` says that it replaces what an earlier run trained.
    """

    checkpoint: str | None = None
    must_match: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    says: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    at_stake: bool = False
    overwrite: bool = False
    record: dict[str, Any] | None = None
    seen: bytes | None = None
    manifest: dict[str, Any] | None = None
    invalid: list[tuple[Path, str]] = field(default_factory=list)


def interruption(
    record: dict[str, Any] | None,
    checkpoint: str | None,
    reached: progress.Progress | None,
    step: int,
    seconds: float,
    aside: list[str],
) -> dict[str, Any]:
    """Returns an entry of `interruptions`: how the last start ended, and what that cost."""
    old = record or {}
    entry = {
        "status": old.get("status", "unknown"),
        "reason": old.get("reason"),
        "continued": now_utc(),
    }
    cost = progress.cost(reached, step, seconds, time.time())
    return entry | {"from": checkpoint, "step": step, **cost, "set_aside": aside}


def max_steps(checkpoint: Path) -> int | None:
    """Returns the steps of the whole training that a checkpoint belongs to, if it says so."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return int(state["max_steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def now_utc() -> str:
    """Returns the time, in UTC to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
