"""What came out of a run that was interrupted or broken, and a table of what came out."""

import statistics
from pathlib import Path
from typing import Any

from conftest import read
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sftlab.files import file_hash
from sftlab.runs.record import read_run


def succeeded(run: Path) -> bool:
    """Whether a run says so; a damaged run.json is refused and stays as it is."""
    try:
        return read_run(run)["status"] == "succeeded"
    except ValueError:
        return False


def outcome(run: Path) -> dict[str, Any]:
    """What must be the same."""
    record = read(run)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.endswith(("runtime", "_per_second"))]
    return {
        "adapter": file_hash(run / "adapter" / "adapter_model.safetensors"),
        "losses": record["losses"],
        "train_loss": record["measured"]["train_loss"],
        "validation_loss": record["measured"]["validation_loss"],
        "trainable_dtypes": record["ran"]["trainable_dtypes"],
        "curves": {
            tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags
        },
    }


def refusal(run: Path) -> dict[str, Any]:
    """A start that ended in one sentence was refused; with a traceback it failed."""
    said = Path(f"{run}.log").read_text()
    last = said.strip().splitlines()[-1]
    return {
        "result": "refused" if last.startswith("error: ") and "Traceback" not in said else "failed",
        "why": last,
    }


def summary(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a case and kind."""
    rows = []
    for case, kind in dict.fromkeys((line["case"], line["kind"]) for line in lines):
        mine = [line for line in lines if (line["case"], line["kind"]) == (case, kind)]
        count = {
            result: sum(line["result"] == result for line in mine)
            for result in ("exact", "refused", "caught")
        }
        steps = [line["steps_again"] for line in mine if line.get("steps_again") is not None]
        row = {"case": case, "kind": kind, "trials": len(mine)}
        row |= {how: sum(line.get(how, 0) for line in mine) for how in ("kills", "signals")} | count
        row["otherwise"] = len(mine) - sum(count.values())
        row["steps_done_again"] = (
            f"{statistics.median(steps):g} [{min(steps)}, {max(steps)}]" if steps else ""
        )
        row["checkpoints_set_aside"] = sum(line.get("set_aside", 0) for line in mine)
        rows.append(row)
    keys = ("trials", "kills", "signals", "exact", "refused", "caught", "otherwise")
    whole = {key: sum(row[key] for row in rows) for key in keys}
    return [*rows, {"case": "all", "kind": "", **whole}]
