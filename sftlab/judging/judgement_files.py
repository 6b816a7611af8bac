"""What evaluations by a judge write and print alike: entries, records, warnings, sanity checks."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

from sftlab.evaluation.answer_file import AnswerFile, digest
from sftlab.evaluation.entries import read_entries
from sftlab.evaluation.processes import Processes
from sftlab.files import write_json
from sftlab.runs.environment import environment
from sftlab.runs.run_directory import adapter_hash
from sftlab.tables import aligned


def verdict_file(folder: Path, judge: Mapping[str, Any], processes: Processes) -> AnswerFile:
    """Open the judge's kept judgements in `folder`. The server's address does not matter for them.

    `judge` holds the facts that name the judge. Its batches are dealt over `processes`.
    """
    settings = {name: fact for name, fact in judge.items() if name != "server"}
    return AnswerFile(folder, settings, "verdicts", processes)


def entry_facts(
    run: Path, title: str, rows: int, judge: Mapping[str, Any], checks: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns what every entry holds: the run, the judge, its sanity checks and the machine.

    `rows` is the number of questions, `checks` the rows of the sanity checks.
    """
    return {
        "title": title,
        "run": str(run),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "adapter_hash": adapter_hash(run),
        "rows": rows,
        "judge": judge,
        "judge_fit": all(row["passed"] is not False for row in checks),
        "sanity_checks": checks,
        **environment(),
    }


def keep_entry(path: Path, entry: Mapping[str, Any]) -> None:
    """Add an entry to a file of entries. It replaces one of the same title."""
    kept = [one for one in read_entries(path, ("title",)) if one["title"] != entry["title"]]
    write_json(path, {"entries": [*kept, entry]})


def title_hash(title: str) -> str:
    """Returns what tells one entry's files from another's (8 hexadecimal digits)."""
    return hashlib.sha256(title.encode()).hexdigest()[:8]


def write_records(
    folder: Path, name: str, title: str, **kinds: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Write one file of JSON lines per kind of record.

    Returns the files' names, which hold a hash of the entry's title.
    """
    files = []
    for kind, records in kinds.items():
        files.append(f"{name}-{kind}-{title_hash(title)}.jsonl")
        lines = (json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)
        (folder / files[-1]).write_text("".join(lines), encoding="utf-8")
    return files


def judgement_hashes(
    records: Mapping[str, Sequence[Mapping[str, Any]]], *keys: str
) -> dict[str, str]:
    """Returns a hash of each side's judgements and of what was judged (`keys` of a record).

    Raises ValueError where two sides have the same hash.
    """
    found = {
        side: digest([[record[key] for key in keys] for record in one])
        for side, one in records.items()
    }
    for one, other in combinations(found, 2):
        if found[one] == found[other]:
            raise ValueError(
                f"{one} and {other} have the same judgements (their hashes are equal): one model "
                "was taken for the other, and there is nothing to compare"
            )
    return found


def unfit_warning(report: Mapping[str, Any]) -> list[str]:
    """Returns a warning that names the sanity checks a judge failed or left open, if any."""
    failed, left_open = (
        ", ".join(row["check"] for row in report["sanity_checks"] if row["passed"] is state)
        for state in (False, None)
    )
    if failed:
        return [f"the judge is UNFIT, it failed: {failed}; its verdicts on the models mean nothing"]
    if left_open:
        return [f"the judge is not shown to be fit, too few pairs: {left_open}"]
    return []


def unfit_mark(report: Mapping[str, Any]) -> str:
    """Returns what stands beside a score of an unfit judge."""
    return "" if report["judge_fit"] else " (UNFIT judge)"


def report_head(report: Mapping[str, Any], questions: str) -> str:
    """Returns the first lines of a printed report: title, warnings and sanity checks.

    `questions` says what the rows are.
    """
    shown = all(row["passed"] is not None for row in report["sanity_checks"])
    fit = ("fit" if shown else "not shown to be fit") if report["judge_fit"] else "UNFIT"
    return "\n".join(
        [
            f"\n{report['title']}: base against tuned of {report['run']} on {report['rows']} "
            f"{questions}",
            *(f"  warning: {warning}" for warning in report["warnings"]),
            f"\n{sanity_check_table(report['sanity_checks'])}",
            f"  the judge is {fit}\n",
        ]
    )


def share(one: Mapping[str, Any]) -> str:
    """Returns a share with its interval, in per cent."""
    if one["value"] is None:
        return "none"
    low, high = one["interval_95"]
    return f"{100 * one['value']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def sanity_check_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the sanity checks as lines of text."""
    lines = [["sanity check", "expected", "found", "pairs", "", ""]]
    for row in rows:
        passed = {True: "passed", False: "FAILED", None: "open"}[row["passed"]]
        lines.append(
            [row["check"], row["expected"], share(row), str(row["pairs"]), passed, row["note"]]
        )
    return aligned(lines)
