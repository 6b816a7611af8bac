"""How fast has each shape of a model been trained? Read from the tables in results/."""

from pathlib import Path
from typing import NamedTuple

from sftlab.tables import read_csv

# the shape of tables that do not name one
SHAPE = "llama3.2-1b"
# the project's own trainings in bf16
VARIANT = "sft.py bf16"
# what a table says of a training without a speed
FAILED = "failed"


class Speed(NamedTuple):
    """Real tokens/s on one GPU, and the table that says so."""

    tokens_per_s: float
    table: Path


def committed_speeds(results: Path) -> dict[str, Speed]:
    """Returns the fastest training in bf16 on one GPU of every shape in `*/throughput.csv`."""
    found: dict[str, Speed] = {}
    for table in sorted(results.glob("*/throughput.csv")):
        for row in read_csv(table):
            if not row["variant"].startswith(VARIANT) or row.get("gpus", "1") != "1":
                continue
            if row["tokens_per_s"] == FAILED:
                continue
            shape, speed = row.get("shape") or SHAPE, float(row["tokens_per_s"] or 0)
            if speed > found.get(shape, Speed(0.0, table)).tokens_per_s:
                found[shape] = Speed(speed, table)
    return found
