"""The runs in a folder: those that can be chatted with, and those that cannot be read, with why."""

from pathlib import Path
from typing import Any, NamedTuple

from sftlab.evaluation.base_and_tuned import finished_run
from sftlab.runs.record import read_run
from sftlab.runs.run_directory import SIDES, adapter_hash
from sftlab.schema import NUMBER, OBJECT, TEXT, Kind, check, list_of, read_object
from sftlab.tables import interval

HEADINGS = (
    "run",
    "base model",
    "data",
    "targets",
    "rank",
    "precision",
    "perplexity of base",
    "of tuned",
)
_ENDS = Kind(
    "two numbers or nulls",
    lambda value: list_of(NUMBER.or_null()).holds(value) and len(value) == 2,
)
_QUALITY = {"adapter_hash": TEXT.or_null(), "scores": OBJECT}
_QUALITY |= {f"scores.response_perplexity.{side}.value": NUMBER for side in SIDES}
_QUALITY |= {f"scores.response_perplexity.{side}.interval_95": _ENDS for side in SIDES}


class RunList(NamedTuple):
    """run.json of each finished run by name, and why the others cannot be read."""

    runs: dict[str, dict[str, Any]]
    unreadable: dict[str, str]


def list_runs(folder: Path, first: str | None) -> RunList:
    """Returns the runs in `folder`: `first`, then the newest. Unfinished runs are left out."""
    found, unreadable = {}, {}
    for path in sorted(folder.glob("*/run.json")):
        name = path.parent.name
        try:
            run = read_run(path.parent)
            if run["status"] == "succeeded":
                found[name] = finished_run(path.parent)
        except ValueError as error:
            unreadable[name] = str(error)
    order = {name: (name == first, run.get("finished") or "") for name, run in found.items()}
    return RunList(
        {name: found[name] for name in sorted(found, key=order.get, reverse=True)}, unreadable
    )


def cells(folder: Path, run: dict[str, Any]) -> list[str]:
    """Returns a run's cells under HEADINGS."""
    recipe = run["recipe"]
    targets = recipe.get("lora_target_modules") or ""
    if not isinstance(targets, str):
        targets = " ".join(sorted(target.removesuffix("_proj") for target in targets))
    shown = (
        folder.name,
        recipe["model_name_or_path"],
        recipe.get("dataset_name") or "",
        targets,
        recipe.get("lora_r") or "",
        run["launch"].get("precision") or "",
    )
    return [*map(str, shown), *_perplexity(folder)]


def _perplexity(folder: Path) -> list[str]:
    """Returns the response perplexity of base and tuned, if they are of this adapter."""
    path = folder / "eval" / "quality.json"
    if not path.exists():
        return ["not measured", ""]
    try:
        quality = read_object(path)
        check(quality, str(path), _QUALITY)
    except ValueError:
        return ["eval/quality.json cannot be read", ""]
    if quality["adapter_hash"] != adapter_hash(folder):
        return ["not measured", ""]
    return [interval(quality["scores"]["response_perplexity"][side]) for side in SIDES]
