"""How far are plans from what was measured? Read from results/plan_accuracy/plan_accuracy.csv."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from sftlab.planning.gpu_specs import MEASURED_ON, gpu_seen_as
from sftlab.tables import read_csv

# How far from the measured figure a plan may be.
LIMITS = {"memory": 0.05, "speed": 0.15}
# What a cell's `held_out` column says, and how it is counted. Cells that the planner's constants
# were fitted to count only where there are no others.
KINDS = {"extrapolated": "", "yes": "held-out ", "no": "fitted "}


def known_accuracy(gpu: str, table: Path) -> tuple[str, dict[str, str]]:
    """Returns the GPU that plans were measured on, and how many were near, by what is planned.

    The GPU's own cells count, else the H200's.
    """
    lines = [line for line in read_csv(table) if line["hardware"]]
    own = [line for line in lines if (seen := gpu_seen_as(line["hardware"])) and seen.name == gpu]
    counted = own or [line for line in lines if line["held_out"] != "extrapolated"]
    found = {what: _near(counted, what, limit) for what, limit in LIMITS.items()}
    return (gpu if own else MEASURED_ON), found


def _near(lines: Sequence[Mapping[str, str]], what: str, limit: float) -> str:
    for kind, title in KINDS.items():
        errors = [
            abs(float(line[f"{what}_error"]))
            for line in lines
            if line["held_out"] == kind and line[f"{what}_error"]
        ]
        if errors:
            near = sum(error <= limit for error in errors)
            return f"within {limit:.0%} on {near} of {len(errors)} {title}cells"
    return "not measured"
