"""What evaluations by a judge write and print alike: entries, records, the table of canaries."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftlab.evaluation.answer_file import digest
from sftlab.files import write_json
from sftlab.tables import aligned


def keep_entry(path: Path, entry: Mapping[str, Any]) -> None:
    """Put an entry into a file of them, in the place of one of the same title."""
    entries = json.loads(path.read_text(encoding="utf-8"))["entries"] if path.is_file() else []
    kept = [one for one in entries if one["title"] != entry["title"]]
    write_json(path, {"entries": [*kept, entry]})


def title_hash(title: str) -> str:
    """What tells the files of one entry from those of another (hexadecimal, 8 digits)."""
    return hashlib.sha256(title.encode()).hexdigest()[:8]


def write_records(
    folder: Path, name: str, title: str, **kinds: Sequence[Mapping[str, Any]]
) -> list[str]:
    """A file of records, one a line, of each kind; their names hold a hash of the entry's title."""
    files = []
    for kind, records in kinds.items():
        files.append(f"{name}-{kind}-{title_hash(title)}.jsonl")
        lines = (json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)
        (folder / files[-1]).write_text("".join(lines), encoding="utf-8")
    return files


def judgement_hashes(
    records: Mapping[str, Sequence[Mapping[str, Any]]], *keys: str
) -> dict[str, str]:
    """The hash of each side's judgements with what was judged (`keys` of a record).

    ValueError where two sides have the same.
    """
    found = {
        side: digest([[record[key] for key in keys] for record in one])
        for side, one in records.items()
    }
    if len(set(found.values())) < len(found):
        raise ValueError(
            "base and tuned have the same judgements (their hashes are alike): one model was taken "
            "for the other, and "
            "there is nothing to compare"
        )
    return found


def share(one: Mapping[str, Any]) -> str:
    """A share with its interval, in per cent."""
    if one["value"] is None:
        return "none"
    low, high = one["interval_95"]
    return f"{100 * one['value']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def canary_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The canaries as lines of text."""
    lines = [["canary", "expected", "found", "pairs", "", ""]]
    for row in rows:
        passed = "passed" if row["passed"] else "FAILED"
        lines.append(
            [row["canary"], row["expected"], share(row), str(row["pairs"]), passed, row["note"]]
        )
    return aligned(lines)
