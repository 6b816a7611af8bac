"""The rows that a run prints when it has ended."""

from collections.abc import Mapping
from typing import Any

_SPLITS = ("train", "validation", "test")


def summary_rows(record: Mapping[str, Any]) -> dict[str, str]:
    """Returns name and value of each row; `record` is the run.json of a run that succeeded."""
    ran, measured, data = record["ran"], record["measured"], record["data"]
    lengths = data["tokenized"]
    rows = {
        "precision, strategy": f"{ran['precision']}, {ran['strategy']} over {ran['world_size']}",
        "trainable parameters": (
            f"{ran['trainable_parameters']:,} ({', '.join(ran['trainable_dtypes'])})"
        ),
        "rows": ", ".join(f"{name} {data[name]['rows']}" for name in _SPLITS),
        "cut, dropped at max_length": "unknown: the data are streamed",
        "global batch": f"{ran['micro_batch']} x {ran['accumulation']} x {ran['world_size']}",
        "real tokens/s, rows/s": f"{measured['tokens_per_s']}, {measured['rows_per_s']}",
        "MFU": _mfu(measured),
        "peak memory per rank (GB)": " ".join(
            str(rank.get("reserved_gb", rank.get("resident_gb")))
            for rank in measured["peak_memory"]
        ),
        **planned_row(measured),
        "first step, training (s)": (
            f"{measured['time_to_first_step_s']}, {measured['train_seconds']}"
        ),
        **_method_row(ran),
        "train loss": f"{measured['train_loss']:.4f}",
        "validation loss": "no validation split",
    }
    if lengths:
        cut_dropped = f"{lengths['cut']}, {lengths['dropped']} train rows"
        rows["cut, dropped at max_length"] = cut_dropped
    if "validation_loss" in measured:
        rows["validation loss"] = f"{measured['validation_loss']:.4f}"
    if "validation_reward_accuracy" in measured:
        accuracy, margin = (measured[f"validation_reward_{one}"] for one in ("accuracy", "margin"))
        rows["reward accuracy, margin"] = f"{accuracy:.1%}, {margin:.3f} on validation pairs"
    return rows


def _method_row(ran: Mapping[str, Any]) -> dict[str, str]:
    """Returns the row that names the reference of preference tuning; none otherwise."""
    return {"reference": ran["reference"]} if "reference" in ran else {}


def _mfu(measured: Mapping[str, Any]) -> str:
    if not measured["limit_tflops_per_s"]:
        return "not measured on a CPU"
    if not measured["share_of_limit"]:
        return "not measured: too few steps"
    rate = f"{measured['limit_tflops_per_s']} TFLOP/s ({measured['limit']})"
    return f"{measured['share_of_limit']:.1%} of {rate}"


def planned_row(measured: Mapping[str, Any]) -> dict[str, str]:
    """Returns a row with the largest rank's allocated memory beside the planned one.

    Empty without a plan, as on a CPU.
    """
    plan = measured.get("planned_memory", {})
    if "allocated_gb" not in plan:
        return {"planned memory": plan["reason"]} if plan else {}
    peak = max(rank["allocated_gb"] for rank in measured["peak_memory"])
    off = plan["allocated_gb"] / peak - 1
    return {"allocated, planned (GB)": f"{peak}, {plan['allocated_gb']} ({off:+.1%})"}
