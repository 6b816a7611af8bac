"""What must be the same for a run to continue exactly, and what differs."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

# recipe fields that may differ between an interrupted run and its continuation
_FREE_FIELDS = {
    "overwrite",
    "resume_anyway",
    "extend",
    "disable_tqdm",
    "log_level",
    "logging_first_step",
    "report_to",
    "dataset_num_proc",
    "output_dir",
    "logging_dir",
    "run_name",
    "save_total_limit",
    "save_adapter",
}


def must_match(
    recipe: Mapping[str, Any], launch: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns what must be the same for an exact continuation, as a manifest holds it.

    `now` is `environment()`.
    """
    asked = {name: launch.get(name) for name in ("precision", "strategy", "world_size")}
    found = {"recipe": dict(recipe), "launch": asked, "versions": now["versions"]}
    return json.loads(json.dumps(found, default=str))


def comparable(hardware: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the hardware that decides the order of sums, and so the last digits.

    That is the GPU, or without one the machine and its number of CPU cores.
    """
    return {
        name: hardware.get(name)
        for name in (("gpu",) if hardware.get("gpu") else ("cpu_cores", "machine"))
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield each difference in a few words. Settings that may differ are left out."""
    old, new = (json.loads(json.dumps(dict(one), default=str)) for one in (old, new))
    for name in sorted(set(old) | set(new)):
        was, is_ = old.get(name), new.get(name)
        if was == is_ or name in _FREE_FIELDS:
            continue
        if isinstance(was, dict) and isinstance(is_, dict):
            yield from differences(was, is_, "" if name == "recipe" else f"{prefix}{name} ")
        else:
            yield f"{prefix}{name} ({was!r} was, {is_!r} is)".replace(
                "launch world_size", "world size"
            )
