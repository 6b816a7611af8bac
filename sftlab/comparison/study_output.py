"""Where do a study's tables go, and what may they replace there?"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from sftlab.comparison.output_folder import check_output_folder

RUNS_LINE = "- runs: "
_ASIDE = "move it aside, or pass another --out"


def check_output(out: Path, runs: Path) -> None:
    """Raise ValueError where `out` is no study's folder, or holds the tables of other runs."""
    check_output_folder(out, "study.md", beside_runs=out.resolve() == runs.resolve())
    page = out / "study.md"
    if not page.is_file():
        return
    lines = page.read_text(encoding="utf-8", errors="replace").splitlines()
    said = next((line.removeprefix(RUNS_LINE) for line in lines if line.startswith(RUNS_LINE)), "")
    if said != str(runs):
        theirs = f"the runs in {said}" if said else "runs elsewhere"
        raise ValueError(f"{page} is about {theirs}, and this study's are in {runs}: {_ASIDE}")


def check_not_emptied(out: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Raise ValueError where tables with results would be replaced by tables without any."""
    kept = out / "runs.csv"
    if not kept.is_file() or any(row["status"] == "succeeded" for row in rows):
        return
    with kept.open(encoding="utf-8", newline="") as file:
        had = any(row.get("status") == "succeeded" for row in csv.DictReader(file))
    if had:
        raise ValueError(f"no run has a result, and {kept} has some: {_ASIDE}")
