"""Runs side by side: which figures do they have, and what must a reader know about them?"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sftlab.comparison import comparability
from sftlab.comparison.run_results import RunResults, about, compare_tuned, duplicates, figures
from sftlab.comparison.run_settings import Settings, settings
from sftlab.evaluation.significance import RESAMPLES, add_holm
from sftlab.evaluation.text_metrics import NAMES
from sftlab.tables import interval, p_value

# CSV column: its heading in a table, and how a figure is written there
COLUMNS = {
    "precision": ("precision", "{}"),
    "strategy": ("strategy", "{}"),
    "world_size": ("processes", "{}"),
    "trainable_parameters": ("trainable", "{:,}"),
    "lora_scale": ("LoRA scale", "{}"),
    "tokens_per_s": ("real tokens/s", "{:,.0f}"),
    "rows_per_s": ("rows/s", "{:,.1f}"),
    "share_of_limit": ("MFU", "{:.1%}"),
    "peak_memory_gb": ("peak GB a rank", "{:.2f}"),
    "peak_memory_is": ("memory", "{}"),
    "train_seconds": ("train s", "{:,.1f}"),
    "train_loss": ("train loss", "{:.4f}"),
    "validation_loss": ("validation loss", "{:.4f}"),
    "note": ("note", "{}"),
}
# Scores that tables show and tuned models are compared in.
SHOWN = ("response_perplexity", "bleu", "rougeL")
# A score of some data alone, shown where runs have it.
IF_SCORED = "final_number"

Rows = dict[str, dict[str, Any]]


class Comparison(NamedTuple):
    """Runs in the order of the axes, with a CSV row each, and what a reader must know.

    `unexplained` has a line for each difference that the axes leave.
    """

    runs: dict[str, RunResults]
    rows: Rows
    axes: list[str]
    unexplained: list[str]
    notes: list[str]
    warnings: list[str]

    @property
    def one_method(self) -> bool:
        """Whether all runs were trained in the same way, with losses that can be compared."""
        return len({method_of(one.run) for one in self.runs.values()}) == 1


def method_of(run: Mapping[str, Any]) -> str:
    """Returns sft or dpo; runs of earlier versions know supervised fine-tuning alone."""
    return run["recipe"].get("method") or "sft"


def check_comparable(
    runs: Mapping[str, RunResults], asked: Sequence[str], allow: bool
) -> Comparison:
    """Compare runs by the axes asked for, or by the one that explains their differences.

    Raises ValueError where they differ in more than the axes explain, unless `allow`.
    """
    unsorted = {name: settings(one.run, one.quality, one.judged) for name, one in runs.items()}
    axes = comparability.resolve_axes(unsorted, asked, allow)
    compared = _in_order(unsorted, axes)
    runs = {name: runs[name] for name in compared}
    left = comparability.differences(compared, axes)
    unexplained = comparability.describe(left)
    rows: Rows = {}
    for name, one in compared.items():
        rows[name] = {"run": name, "confounded": "; ".join(unexplained) or "no"}
        rows[name] |= {f"axis {axis}": comparability.short(one.value(axis)) for axis in axes}
        rows[name] |= figures(runs[name], one.facts)
    methods = {name: method_of(one.run) for name, one in runs.items()}
    if len(set(methods.values())) > 1:
        for row in rows.values():
            row |= dict.fromkeys(("train_loss", "validation_loss"))
    notes = _axis_notes(compared, axes, left, inferred=not asked)
    notes += _method_notes(methods) + _code_notes(runs) + _speed_notes(compared, rows)
    warnings = _stale_warnings(runs) + _axis_warnings(compared, rows, axes)
    warnings += _duplicate_warnings(runs, rows)
    for row in rows.values():
        row |= {key: portable(value) for key, value in row.items() if isinstance(value, str)}
    return Comparison(runs, rows, axes, unexplained, notes, warnings)


def _in_order(compared: Mapping[str, Settings], axes: Sequence[str]) -> dict[str, Settings]:
    """Returns the settings sorted by the axes' values, then by name."""

    def key(name: str) -> tuple:
        return [comparability.in_order(compared[name].value(axis)) for axis in axes], name

    return {name: compared[name] for name in sorted(compared, key=key)}


def _axis_notes(
    compared: Mapping[str, Settings],
    axes: Sequence[str],
    left: comparability.Differences,
    inferred: bool,
) -> list[str]:
    """Returns the axes, and what else differs because of them."""
    none = "none" if left else "none, all settings are equal"
    notes = [f"axis: {', '.join(axes) or none}{' (inferred)' if inferred and axes else ''}"]
    shown = {*left, *axes, *COLUMNS}
    follows = {
        field: values
        for field, values in comparability.differences(compared).items()
        if field not in shown
    }
    return notes + [f"differs with the axis: {x}" for x in comparability.describe(follows)]


def _method_notes(methods: Mapping[str, str]) -> list[str]:
    """Returns what cannot be compared of runs that were trained in different ways."""
    if len(set(methods.values())) == 1:
        return []
    kinds = " | ".join(
        f"{kind} ({', '.join(name for name, one in methods.items() if one == kind)})"
        for kind in dict.fromkeys(methods.values())
    )
    return [
        f"methods: {kinds}. Losses are left out, for they are of different kinds; a token of dpo "
        "costs a forward of its reference more. Scores of the same held-out rows can be compared: "
        "they are of whole stages, data and settings together"
    ]


def _code_notes(runs: Mapping[str, RunResults]) -> list[str]:
    commits = {name: one.run.get("git_commit") for name, one in runs.items()}
    if len(set(commits.values())) == 1:
        return []
    return comparability.describe({"code differs, git_commit": commits})


def _speed_notes(compared: Mapping[str, Settings], rows: Rows) -> list[str]:
    """Returns the range of speeds of runs that differ only in the seed."""
    notes = []
    for group in comparability.replicas(compared):
        speeds = [rows[name]["tokens_per_s"] or 0.0 for name in group]
        if all(speeds):
            ends = f"{min(speeds):,.0f} to {max(speeds):,.0f} real tokens/s"
            notes.append(f"alike but for the seed, {', '.join(group)}: {ends}")
    but = " but those ranges" if notes else ""
    return [*notes, f"speed: one run each, so no interval{but}"]


def _stale_warnings(runs: Mapping[str, RunResults]) -> list[str]:
    return [
        f"{name}: {' and '.join(one.stale)}, of another adapter than the run's; evaluate it again"
        for name, one in runs.items()
        if one.stale
    ]


def _axis_warnings(compared: Mapping[str, Settings], rows: Rows, axes: Sequence[str]) -> list[str]:
    """Returns which axes do not vary, and which vary together."""
    warnings = []
    for axis in axes:
        if len({row[f"axis {axis}"] for row in rows.values()}) == 1 < len(rows):
            warnings.append(f"the runs do not differ in {axis}")
    for a, b in comparability.moving_together(compared, axes):
        warnings.append(f"{a} and {b} change together: their effects cannot be told apart")
    return warnings


def _duplicate_warnings(runs: Mapping[str, RunResults], rows: Rows) -> list[str]:
    """Returns which runs are one measurement under two names, and notes it in their rows."""
    warnings = []
    for a, b, same in duplicates(runs):
        kinds = {what.partition(" (")[0] for what in same.split(", ")}
        means = "that is one measurement, not two"
        if kinds == {"answers"}:
            means = "their adapters differ, and their answers do not show it"
        warnings.append(f"{a} and {b} hold the same {same}: {means}")
        for name, other in ((a, b), (b, a)):
            notes = (rows[name]["note"], f"same {same} as {other}")
            rows[name]["note"] = "; ".join(filter(None, notes))
    return warnings


def against_reference(comparison: Comparison, asked: Path | None) -> tuple[str, list[list[str]]]:
    """Compare each run's tuned scores with those of one run: `asked`, else the first with scores.

    Returns what is said about the comparison, and its table ([] where there is nothing to compare).
    Raises ValueError for a reference that is asked for and has no scores, or none in common.
    """
    runs = comparison.runs
    scored = [name for name, one in runs.items() if one.records]
    named = [name for name in scored if asked and _is_run(name, runs[name].folder, asked)]
    if asked and not named:
        raise ValueError(
            f"--reference {asked}: not among the runs of this report that have scores of their "
            f"own ({', '.join(scored) or 'none has'})"
        )
    if not scored:
        return "", []
    reference = (named or scored)[0]
    first = runs[reference].records[0]["tuned"]
    shown = (*SHOWN, *([IF_SCORED] if IF_SCORED in first else []))
    compared, left_out = compare_tuned(runs, reference, shown)
    if asked and left_out and not compared:
        raise ValueError(
            f"--reference {asked}: no other run can be compared with it: {', '.join(left_out)}"
        )
    if not compared:
        other = f"Tuned models are not compared with {reference}: {', '.join(left_out)}"
        return other if len(scored) > 1 else "", []
    for score in shown:
        add_holm({name: scores[score] for name, scores in compared.items() if score in scores})
    said = (
        f"Tuned models against {reference}: tuned minus tuned on the same held-out rows, in "
        f"brackets 95 % intervals; p by exchanging the models ({RESAMPLES:,} times), after Holm "
        "over the runs of a score"
    )
    said += f"; not compared: {', '.join(left_out)}" if left_out else ""
    return said, _difference_table(compared, shown)


def _is_run(name: str, folder: Path, asked: Path) -> bool:
    return name == str(asked) or folder.resolve() == asked.resolve()


def _difference_table(
    compared: Mapping[str, Mapping[str, Any]], shown: Sequence[str]
) -> list[list[str]]:
    lines = [["run", *(f"{NAMES[score]}{what}" for score in shown for what in ("", ", p"))]]
    for name, scores in compared.items():
        line = [name]
        for one in (scores.get(score) for score in shown):
            line += [interval(one["difference"]), p_value(one["p_holm"])] if one else ["", ""]
        lines.append(line)
    return lines


def shared_facts(comparison: Comparison) -> list[str]:
    """Returns hardware, versions, model, data and training; where runs differ, each value."""
    found = [about(one.run) for one in comparison.runs.values()]
    return [
        f"{name}: {' | '.join(dict.fromkeys(facts[name] for facts in found))}" for name in found[0]
    ]


def portable(text: str) -> str:
    """Returns a text without this machine's paths.

    They become relative to the working directory; elsewhere only a path's last part is left.
    """
    return re.sub(r"(?<![\w.~/-])/(?:[\w.@+-]+/)+", "", text.replace(f"{Path.cwd()}/", ""))
