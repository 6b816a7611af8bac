"""Runs side by side: what ran, speed, memory, losses, scores with intervals, and whether they may
be compared at all.

python eval/report.py --runs runs --out results/report [--axis lora_r lora_target_modules] [--reference runs/x]
    [--allow-confounded]

Reads run.json and what eval/ wrote beside it; writes OUT/report.md, runs.csv and plots (PNG and
SVG). Refuses runs that differ in more than the axis asked for; sftlab/comparison/comparability.py
knows what follows from which axis.
"""

import argparse
import re
import shlex
import sys
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from sftlab.comparison import comparability
from sftlab.comparison.run_results import (
    Evidence,
    about,
    compare_tuned,
    figures,
    find_runs,
    read_evidence,
    twins,
)
from sftlab.evaluation.significance import RESAMPLES, add_holm
from sftlab.evaluation.text_metrics import NAMES
from sftlab.runs.run_directory import SIDES
from sftlab.tables import (
    aligned,
    interval,
    markdown,
    p_value,
    preview,
    without_empty_columns,
    write_csv,
)

SHOWN = ("response_perplexity", "bleu", "rougeL")
# CSV column: its heading in the table, and how a figure is written there
COLUMNS = {
    "precision": ("precision", "{}"),
    "strategy": ("strategy", "{}"),
    "world_size": ("processes", "{}"),
    "trainable_parameters": ("trainable", "{:,}"),
    "lora_scale": ("LoRA scale", "{}"),
    "tokens_per_s": ("real tokens/s", "{:,.0f}"),
    "rows_per_s": ("rows/s", "{:,.1f}"),
    "share_of_limit": ("of the limit", "{:.1%}"),
    "peak_memory_gb": ("peak GB a rank", "{:.2f}"),
    "peak_memory_is": ("memory", "{}"),
    "train_seconds": ("train s", "{:,.1f}"),
    "train_loss": ("train loss", "{:.4f}"),
    "validation_loss": ("validation loss", "{:.4f}"),
    "note": ("note", "{}"),
}
BRIEF = ("tokens_per_s", "peak_memory_gb", "train_loss", "validation_loss")
STYLE = {
    "svg.hashsalt": "sftlab",
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
}
Table = list[list[str]]


class Report(NamedTuple):
    """Runs in the order of the axes, their CSV rows, what confounds them, what a reader must know."""

    runs: dict[str, Evidence]
    rows: dict[str, dict[str, Any]]
    axes: list[str]
    confounders: list[str]
    notes: list[str]
    warnings: list[str]


def main(argv: list[str]) -> None:
    """Read, check, compare, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs", nargs="+", type=Path, required=True, help="run directories, or folders of them"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results/report"), help="where the report is written"
    )
    parser.add_argument(
        "--axis",
        nargs="+",
        default=[],
        metavar="FIELD",
        help="what is compared (default: inferred)",
    )
    parser.add_argument(
        "--reference", type=Path, help="the run that the tuned models are compared with"
    )
    parser.add_argument(
        "--allow-confounded", action="store_true", help="show runs that differ in more, marked so"
    )
    arguments = parser.parse_args(argv)
    try:
        found = {name: read_evidence(path) for name, path in find_runs(arguments.runs).items()}
        report = judge(found, arguments.axis, arguments.allow_confounded)
        against = against_reference(report, arguments.reference)
    except ValueError as error:
        sys.exit(f"error: {portable(str(error))}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    plots = draw(report, arguments.out)
    write_csv(arguments.out / "runs.csv", list(report.rows.values()))
    (arguments.out / "report.md").write_text(
        portable(as_markdown(report, against, plots, argv)), encoding="utf-8"
    )
    print(portable(as_text(report, against)))
    print(
        f"\nwritten to {arguments.out}: report.md, runs.csv, "
        f"{', '.join(f'{plot}.png/.svg' for plot in plots)}"
    )


def judge(runs: dict[str, Evidence], asked: list[str], allow: bool) -> Report:
    """Settle the axes and collect what a reader must know.

    ValueError where the runs differ in more.
    """
    settings = {
        name: comparability.settings(one.run, one.quality, one.judged) for name, one in runs.items()
    }
    axes = comparability.settle_axes(settings, asked, allow)
    order = sorted(
        runs,
        key=lambda name: (
            [comparability.in_order(settings[name].value(axis)) for axis in axes],
            name,
        ),
    )
    runs, settings = {name: runs[name] for name in order}, {name: settings[name] for name in order}
    left = comparability.differences(settings, axes)
    confounders = comparability.describe(left)
    rows = {name: {"run": name, "confounded": "; ".join(confounders) or "no"} for name in order}
    for name, row in rows.items():
        row |= {f"axis {axis}": comparability.short(settings[name].value(axis)) for axis in axes}
        row |= figures(runs[name], settings[name].facts)
    follows = {
        k: v
        for k, v in comparability.differences(settings).items()
        if k not in {*left, *axes, *COLUMNS}
    }
    none = "none" if left else "none, all settings are equal"
    notes = [f"axis: {', '.join(axes) or none}{'' if asked or not axes else ' (inferred)'}"]
    notes += [f"differs with the axis: {line}" for line in comparability.describe(follows)]
    commits = {name: one.run.get("git_commit") for name, one in runs.items()}
    if len(set(commits.values())) > 1:
        notes += comparability.describe({"code differs, git_commit": commits})
    repeated = False
    for group in comparability.replicas(settings):
        found = [rows[name]["tokens_per_s"] or 0.0 for name in group]
        ends = f"{min(found):,.0f} to {max(found):,.0f} real tokens/s"
        if all(found):
            notes.append(f"alike but for the seed, {', '.join(group)}: {ends}")
            repeated = True
    notes.append(f"speed: one run each, so no interval{' but those ranges' if repeated else ''}")
    stale = {name: " and ".join(one.stale) for name, one in runs.items() if one.stale}
    warnings = [
        f"{name}: {what}, of another adapter than the run's; evaluate it again"
        for name, what in stale.items()
    ]
    for axis in (
        axis
        for axis in axes
        if len({row[f"axis {axis}"] for row in rows.values()}) == 1 < len(rows)
    ):
        warnings.append(f"the runs do not differ in {axis}")
    for a, b in comparability.moving_together(settings, axes):
        warnings.append(
            f"{a} and {b} change together: what one does cannot be told from what the other does"
        )
    for a, b, same in twins(runs):
        alike = {what.partition(" (")[0] for what in same.split(", ")} == {"answers"}
        said = (
            "their adapters differ and that does not show"
            if alike
            else "that is one measurement, not two"
        )
        warnings.append(f"{a} and {b} hold the same {same}: {said}")
        for name, twin in ((a, b), (b, a)):
            rows[name]["note"] = "; ".join(
                filter(None, (rows[name]["note"], f"same {same} as {twin}"))
            )
    rows = {
        name: {k: portable(v) if isinstance(v, str) else v for k, v in row.items()}
        for name, row in rows.items()
    }
    return Report(runs, rows, axes, confounders, notes, warnings)


def against_reference(report: Report, asked: Path | None) -> tuple[str, Table]:
    """Each run's tuned scores against those of one run: what is said about it, and the table."""
    scored = [name for name, one in report.runs.items() if one.records]
    named = [
        n
        for n in scored
        if asked and (n == str(asked) or report.runs[n].folder.resolve() == asked.resolve())
    ]
    if asked and not named:
        raise ValueError(
            f"--reference {asked}: not among the runs of this report that have scores of their own"
        )
    if not scored:
        return "", []
    reference = (named or scored)[0]
    compared, left_out = compare_tuned(report.runs, reference, SHOWN)
    every = {
        f"{name} {score}": one for name, scores in compared.items() for score, one in scores.items()
    }
    add_holm(every)
    said = f"Tuned models against {reference}: tuned minus tuned on the same held-out rows, in brackets 95 % intervals; "
    said += f"p by paired bootstrap ({RESAMPLES:,} resamples), after Holm over all {len(every)} comparisons made here"
    lines = [["run", *(f"{NAMES[score]}{what}" for score in SHOWN for what in ("", ", p"))]]
    for name, scores in compared.items():
        found = [scores.get(score) for score in SHOWN]
        cells = [
            (interval(one["difference"]), p_value(one["p_holm"])) if one else ("", "")
            for one in found
        ]
        lines.append([name, *(cell for pair in cells for cell in pair)])
    said += f"; not compared: {', '.join(left_out)}" if left_out else ""
    return said, lines if compared else []


def table(report: Report, columns: Sequence[str], scores: Sequence[str] = ()) -> Table:
    """Heading and a row a run; columns without any value are left out."""
    titles = [
        f"{side} {NAMES.get(score, score)}"
        for side, _, score in (name.partition(" ") for name in scores)
    ]
    lines = [["run", "status", *report.axes, *(COLUMNS[key][0] for key in columns), *titles]]
    for name, row in report.rows.items():
        why = "" if row["status"] == "out of memory" else preview(row["reason"], 60)
        cells = [name, f"{row['status']}: {why}" if why else row["status"]]
        cells += [row[f"axis {axis}"] for axis in report.axes]
        cells += [
            "" if row[key] in (None, "") else COLUMNS[key][1].format(row[key]) for key in columns
        ]
        for score in scores:
            one = {
                "value": row.get(score),
                "interval_95": [row.get(f"{score} {end}") for end in ("low", "high")],
            }
            cells.append("" if one["value"] is None else interval(one))
        lines.append(cells)
    return without_empty_columns(lines)


def as_markdown(
    report: Report, against: tuple[str, Table], plots: list[str], argv: list[str]
) -> str:
    """report.md."""

    def grid(lines: Table) -> list[str]:
        return [*markdown(lines), ""] if lines else []

    def pictures(*names: str) -> list[str]:
        return [line for name in names if name in plots for line in (f"![{name}]({name}.svg)", "")]

    scores = [f"{side} {score}" for score in SHOWN for side in SIDES]
    known = {
        f"{side} {score}{end}" for score in NAMES for side in SIDES for end in ("", " low", " high")
    }
    found = dict.fromkeys(
        key for row in report.rows.values() for key in row if key.startswith(tuple(SIDES))
    )
    scores += [key for key in found if key not in known and not key.endswith((" low", " high"))]
    lines = [
        "# Runs side by side",
        "",
        *banner(report),
        "```",
        f"python eval/report.py {shlex.join(argv)}",
        "```",
        "",
    ]
    lines += [*(f"- {fact}" for fact in [*shared(report), *report.notes]), ""]
    lines += [*(f"**Warning:** {warning}\n" for warning in report.warnings), "## Runs", ""]
    lines += [*grid(table(report, list(COLUMNS))), *pictures("speed", "memory", "losses")]
    if any(one.quality or one.tasks or one.judged for one in report.runs.values()):
        lines += [
            "## Base and tuned on held-out rows",
            "",
            *grid(table(report, [], scores)),
            *pictures("quality"),
        ]
        lines += [
            f"In brackets 95 % intervals of a bootstrap over rows ({RESAMPLES:,} resamples), of "
            "right answers and won "
            "pairs Wilson's. They and the p-values say how far other rows could move a score, not "
            "how far another "
            "training seed would.\n"
        ]
    if against[1]:
        title, _, said = against[0].partition(": ")
        lines += [f"## {title}", "", f"{said}.", "", *grid(against[1])]
    return "\n".join(lines)


def as_text(report: Report, against: tuple[str, Table]) -> str:
    """The report in the terminal."""
    lines = [*banner(report), *shared(report), *report.notes]
    lines += ["", aligned(table(report, BRIEF, [f"tuned {score}" for score in SHOWN]))]
    if against[1]:
        lines += ["", aligned(against[1]), against[0]]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in report.warnings)])


def banner(report: Report) -> list[str]:
    """What marks a report of runs that differ in more than the axis."""
    differing = [f"- {line}" for line in report.confounders]
    return (
        ["**CONFOUNDED**: these runs differ in more than the axis, in", "", *differing, ""]
        if differing
        else []
    )


def shared(report: Report) -> list[str]:
    """Hardware, versions, and what was trained on what; where runs differ, each value."""
    found = [about(one.run) for one in report.runs.values()]
    return [
        f"{name}: {' | '.join(dict.fromkeys(facts[name] for facts in found))}" for name in found[0]
    ]


def portable(text: str) -> str:
    """Without the paths of this machine:

    relative to the working directory, or the last part alone.
    """
    return re.sub(r"(?<![\w.~/-])/(?:[\w.@+-]+/)+", "", text.replace(f"{Path.cwd()}/", ""))


def draw(report: Report, out: Path) -> list[str]:
    """The plots as PNG and SVG; names of those for which there was something to show."""
    drawn, where = (
        [],
        portable("; ".join(shared(report)[:2]).replace("hardware: ", "").replace("versions: ", "")),
    )
    with matplotlib.rc_context(STYLE):
        for name, (title, paint) in PLOTS.items():
            for suffix in ("png", "svg"):
                (out / f"{name}.{suffix}").unlink(missing_ok=True)
            canvas = Figure(figsize=(9, 1.6 + 0.36 * len(report.rows)), layout="constrained")
            if paint(report, canvas):
                mark = (
                    "CONFOUNDED: these runs differ in more than the axis\n"
                    if report.confounders
                    else ""
                )
                above = mark + title
                canvas.suptitle(
                    f"{above}\n{textwrap.fill(where, 120)}", x=0.01, ha="left", fontsize=9
                )
                canvas.savefig(out / f"{name}.svg", metadata={"Date": None})
                canvas.savefig(out / f"{name}.png", dpi=150)
                drawn.append(name)
    return drawn


def colours(report: Report) -> np.ndarray:
    """A colour a run, the same in every plot, in the order of the axes."""
    return matplotlib.colormaps["viridis"](np.linspace(0.1, 0.9, len(report.rows)))


def bars(report: Report, canvas: Figure, key: str) -> bool:
    """A bar a run; a run without the figure keeps its row and says why."""
    axes, values = canvas.subplots(), [row[key] or 0 for row in report.rows.values()]
    axes.barh(list(report.rows), values, color=colours(report), height=0.65)
    for place, (value, row) in enumerate(zip(values, report.rows.values(), strict=True)):
        ended = row["status"].replace("succeeded", "" if value else "not measured")
        kind = row["peak_memory_is"] if key == "peak_memory_gb" and value else ""
        axes.text(
            value,
            place,
            f" {COLUMNS[key][1].format(value) if value else ''} {kind} {ended}",
            va="center",
        )
    axes.set(xlim=(0, 1.3 * max(values) or 1), ylim=(len(values) - 0.5, -0.5))
    return any(values)


def curves(report: Report, canvas: Figure) -> bool:
    """Every run's training loss; a cross where it stopped being a number."""
    canvas.set_figheight(max(4.2, canvas.get_figheight()))
    axes, seen = canvas.subplots(), []
    styles = zip(colours(report), ["-", "--", "-.", ":"] * len(report.runs), strict=False)
    for (colour, style), (name, one) in zip(styles, report.runs.items(), strict=True):
        steps, losses = np.array(one.run.get("losses") or np.empty((0, 2)), dtype=float).T
        finite, ended = np.isfinite(losses), report.rows[name]["status"]
        if finite.any():
            label, marker = (
                f"{name} ({ended})" if ended != "succeeded" else name,
                "." if len(steps) < 30 else None,
            )
            axes.plot(
                steps,
                np.where(finite, losses, np.nan),
                marker=marker,
                lw=1.2,
                ls=style,
                c=colour,
                label=label,
            )
            last = np.flatnonzero(finite)[-1:] if not finite.all() else []
            axes.plot(steps[last], losses[last], "x", c=colour, ms=9)
        seen += losses[finite].tolist()
    if seen:
        axes.set(
            xlabel="optimizer step", yscale="log" if max(seen) > 10 * min(seen) > 0 else "linear"
        )
        canvas.legend(loc="outside right upper", frameon=False)
    return bool(seen)


def points(report: Report, canvas: Figure) -> bool:
    """A panel a score: base and tuned with their 95 % intervals."""
    scored = [name for name in report.rows if report.runs[name].quality]
    canvas.set_figheight(1.2 + 2 * canvas.get_figheight())
    panels = canvas.subplots(2, 3, sharey=True)
    for (score, title), axes in zip(NAMES.items(), panels.flat, strict=True):
        values = [report.rows[name][f"{side} {score}"] for name in scored for side in SIDES]
        for side, colour, shift in (("base", "0.6", -0.13), ("tuned", "tab:blue", 0.13)):
            places = [list(report.rows).index(name) + shift for name in scored]
            ends = [
                [report.rows[name][f"{side} {score}{end}"] for name in scored]
                for end in ("", " low", " high")
            ]
            axes.hlines(places, *ends[1:], color=colour)
            axes.plot(ends[0], places, "o", color=colour, ms=4, label=side)
        wide = "perplexity" in score and max(values, default=0) > 10 * min(values, default=0)
        axes.set(
            title=title, xscale="log" if wide else "linear", ylim=(len(report.rows) - 0.5, -0.5)
        )
        axes.set_yticks(range(len(report.rows)), report.rows)
    canvas.legend(
        *axes.get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False
    )
    return bool(scored)


PLOTS = {
    "speed": ("Speed: real tokens a second", partial(bars, key="tokens_per_s")),
    "memory": ("Peak memory of a rank, GB", partial(bars, key="peak_memory_gb")),
    "losses": ("Training loss", curves),
    "quality": ("Base and tuned on held-out rows, with 95 % intervals", points),
}

if __name__ == "__main__":
    main(sys.argv[1:])
