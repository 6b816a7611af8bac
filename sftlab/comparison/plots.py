"""How do runs and studies look as plots? PNG and SVG for eval/report.py and recipes/study.py.

matplotlib is imported only when something is drawn.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sftlab.comparison.canvas import new_canvas, save, style
from sftlab.comparison.run_comparison import COLUMNS, Comparison, portable, shared_facts
from sftlab.comparison.study_file import Study
from sftlab.comparison.study_summary import MEASURED, is_scaling
from sftlab.comparison.study_tables import TITLES, title_of
from sftlab.evaluation.text_metrics import NAMES
from sftlab.runs.run_directory import SIDES
from sftlab.tables import figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEASURED_COLOUR, PUBLISHED_COLOUR = "#0072B2", "#D55E00"
# The figures of a study that are drawn, a panel each: the first of a line that was measured.
PANELS = (
    ("published rows_per_s", "tokens_per_s"),
    ("step_activations_gb",),
    ("published peak_memory_gb", "step_peak_gb", "peak_memory_gb"),
    ("train_loss",),
    ("tuned response_perplexity",),
    ("tuned bleu",),
    ("tuned known_perplexity",),
)
# The side, its colour, and how far from a run's place it is drawn.
SIDE_STYLES = (("base", "0.6", -0.13), ("tuned", "tab:blue", 0.13))
# A study of more cells than this has all its panels in one row.
MANY_CELLS = 12


def draw_comparison(comparison: Comparison, out: Path) -> list[str]:
    """Draw speed, memory, losses and scores of runs, and remove plots that no longer apply.

    Returns the names of the plots for which there was something to show.
    """
    drawn = []
    facts = [line.partition(": ")[2] for line in shared_facts(comparison)[:2]]
    below = textwrap.fill(portable("; ".join(facts)), 120)
    mark = "CONFOUNDED: these runs differ in more than the axis\n" if comparison.unexplained else ""
    with style():
        for name, (title, paint) in PLOTS.items():
            for suffix in ("png", "svg"):
                (out / f"{name}.{suffix}").unlink(missing_ok=True)
            if name == "losses" and not comparison.one_method:
                continue
            canvas = new_canvas((9, 1.6 + 0.36 * len(comparison.rows)), layout="constrained")
            if paint(comparison, canvas):
                canvas.suptitle(f"{mark}{title}\n{below}", x=0.01, ha="left", fontsize=9)
                save(canvas, out, name)
                drawn.append(name)
    return drawn


def draw_study(study: Study, summary: Sequence[Mapping[str, Any]], out: Path) -> list[str]:
    """Draw the cells of a study and, where they scale over processes, their speed over processes.

    Returns the names of the plots for which there was something to show.
    """
    drawn = []
    with style():
        for name, paint in ((study.name, _cells), (f"{study.name}_over_processes", _processes)):
            if (canvas := paint(study, summary)) is not None:
                save(canvas, out, name)
                drawn.append(name)
    return drawn


def _run_colours(comparison: Comparison) -> np.ndarray:
    """Returns a colour a run, the same in every plot, in the order of the axes."""
    import matplotlib

    return matplotlib.colormaps["viridis"](np.linspace(0.1, 0.9, len(comparison.rows)))


def _bars(comparison: Comparison, canvas: "Figure", key: str) -> bool:
    """Draw a bar a run; a run without the figure keeps its place and says why."""
    axes, values = canvas.subplots(), [row[key] or 0 for row in comparison.rows.values()]
    axes.barh(list(comparison.rows), values, color=_run_colours(comparison), height=0.65)
    for place, (value, row) in enumerate(zip(values, comparison.rows.values(), strict=True)):
        status = row["status"].replace("succeeded", "" if value else "not measured")
        kind = row["peak_memory_is"] if key == "peak_memory_gb" and value else ""
        written = COLUMNS[key][1].format(value) if value else ""
        axes.text(value, place, f" {written} {kind} {status}", va="center")
    axes.set(xlim=(0, 1.3 * max(values) or 1), ylim=(len(values) - 0.5, -0.5))
    return any(values)


def _losses(comparison: Comparison, canvas: "Figure") -> bool:
    """Draw every run's training loss, with a cross where it stopped being a number."""
    canvas.set_figheight(max(4.2, canvas.get_figheight()))
    axes, seen = canvas.subplots(), []
    lines = ["-", "--", "-.", ":"] * len(comparison.runs)
    styles = zip(_run_colours(comparison), lines, strict=False)
    for (colour, line), (name, one) in zip(styles, comparison.runs.items(), strict=True):
        steps, losses = np.array(one.run.get("losses") or np.empty((0, 2)), dtype=float).T
        finite, status = np.isfinite(losses), comparison.rows[name]["status"]
        if finite.any():
            label = name if status == "succeeded" else f"{name} ({status})"
            options = {"lw": 1.2, "ls": line, "c": colour, "label": label}
            marker = "." if len(steps) < 30 else None
            axes.plot(steps, np.where(finite, losses, np.nan), marker=marker, **options)
            last = np.flatnonzero(finite)[-1:] if not finite.all() else []
            axes.plot(steps[last], losses[last], "x", c=colour, ms=9)
        seen += losses[finite].tolist()
    if seen:
        wide = max(seen) > 10 * min(seen) > 0
        axes.set(xlabel="optimizer step", yscale="log" if wide else "linear")
        canvas.legend(loc="outside right upper", frameon=False)
    return bool(seen)


def _with_ends(
    rows: Sequence[Mapping[str, Any]], score: str
) -> tuple[list[float], list[float], list[float]]:
    """Returns values and interval ends; an end that the rows cannot tell is at the value."""

    def ends(name: str) -> list[float]:
        known = ((row[f"{score} {name}"], row[score]) for row in rows)
        return [value if end is None else end for end, value in known]

    return [row[score] for row in rows], ends("low"), ends("high")


def _is_scored(rows: Mapping[str, Mapping[str, Any]], score: str) -> bool:
    return any(row[f"{side} {score}"] is not None for row in rows.values() for side in SIDES)


def _far_base(rows: Mapping[str, Mapping[str, Any]], score: str) -> str:
    """Returns what to write instead of bases so far away that tuned models would look alike."""
    sides = {}
    for side in SIDES:
        known = [row for row in rows.values() if row[f"{side} {score}"] is not None]
        if len(known) < 2:
            return ""
        sides[side] = _with_ends(known, f"{side} {score}")
    _, low, high = sides["tuned"]
    away = max(*high, *sides["base"][0]) - min(*low, *sides["base"][0])
    if max(high) - min(low) > away / 3:
        return ""
    first, last = (figure(f(sides["base"][0])) for f in (min, max))
    return f"base {first if first == last else f'{first} to {last}'}, not drawn"


def _base_and_tuned(comparison: Comparison, canvas: "Figure") -> bool:
    """Draw a panel a score: base and tuned with their 95 % intervals."""
    rows = comparison.rows
    known = {score: NAMES[score] for score in NAMES if _is_scored(rows, score)} or NAMES
    lines = -(-len(known) // 3)
    canvas.set_figheight(1.2 + lines * canvas.get_figheight())
    panels = canvas.subplots(lines, 3, squeeze=False, sharey=True)
    for axes in panels.flat[len(known) :]:
        axes.axis("off")
    for (score, title), axes in zip(known.items(), panels.flat, strict=False):
        far = _far_base(rows, score)
        for side, colour, shift in SIDE_STYLES[1 if far else 0 :]:
            # a run may have been scored before the score was added
            scored = [name for name in rows if rows[name][f"{side} {score}"] is not None]
            middle, *ends = _with_ends([rows[name] for name in scored], f"{side} {score}")
            places = [list(rows).index(name) + shift for name in scored]
            axes.hlines(places, *ends, color=colour)
            axes.plot(middle, places, "o", color=colour, ms=4)
        axes.set(ylim=(len(rows) - 0.5, -0.5))
        axes.set_title(f"{title}\n{far}" if far else title, fontsize=9)
        axes.set_yticks(range(len(rows)), rows)
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], c=c, marker="o", ms=4, label=side) for side, c, _ in SIDE_STYLES]
    canvas.legend(handles=handles, loc="outside lower right", ncols=2, frameon=False)
    return any(one.quality for one in comparison.runs.values())


PLOTS: dict[str, tuple[str, Callable[[Comparison, "Figure"], bool]]] = {
    "speed": ("Speed: real tokens a second", partial(_bars, key="tokens_per_s")),
    "memory": ("Peak memory of a rank, GB", partial(_bars, key="peak_memory_gb")),
    "losses": ("Training loss", _losses),
    "quality": ("Base and tuned on held-out rows, with 95 % intervals", _base_and_tuned),
}


def _cells(study: Study, summary: Sequence[Mapping[str, Any]]) -> "Figure | None":
    """Draw a panel a measured figure: medians with ranges, published figures as diamonds."""
    shown = _shown(summary)
    if not shown:
        return None
    columns = (
        len(shown) if len(summary) > MANY_CELLS else {4: 2}.get(len(shown), min(3, len(shown)))
    )
    lines = -(-len(shown) // columns)
    width = 3.2 * columns + 0.06 * max(map(len, study.cells))
    canvas = new_canvas((width, (1.2 + 0.28 * len(summary)) * lines + 0.4))
    panels = canvas.subplots(lines, columns, squeeze=False, sharey=True)
    for key, axes in zip(shown, panels.flat, strict=False):
        _panel(axes, key, study.cells, summary)
    for axes in panels.flat[len(shown) :]:
        axes.axis("off")
    published = ""
    if any(f"published {key}" in summary[0] for key in shown):
        conditions = f", {study.published_as}" if study.published_as else ""
        published = f"; diamonds: published{conditions}"
    title = f"{study.title} (circles: median, lines: range of the runs{published})"
    canvas.suptitle(textwrap.fill(title, int(13 * width)), x=0.01, ha="left", fontsize=9)
    canvas.tight_layout()
    return canvas


def _shown(summary: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the figures of PANELS that were measured."""
    found = []
    for keys in PANELS:
        there = [key for key in keys if any(line.get(key) is not None for line in summary)]
        found += [key.removeprefix("published ") for key in there[:1]]
    of_tasks = (key for key in summary[0] if key.startswith("tuned ") and key not in TITLES)
    return found + [key for key in of_tasks if not key.endswith((" low", " high"))]


def _panel(
    axes: "Axes", key: str, cells: Sequence[str], summary: Sequence[Mapping[str, Any]]
) -> None:
    """Draw one figure of every cell."""
    from_zero = key != "train_loss" and key in MEASURED
    published = [line.get(f"published {key}") or 0 for line in summary]
    limit = 1.2 * max(*published, *(line[f"{key} high"] or 0 for line in summary)) or 1
    for place, line in enumerate(summary):
        value = line[key]
        if value is not None:
            ends = line[f"{key} low"], line[f"{key} high"]
            axes.hlines(place, *ends, color=MEASURED_COLOUR, lw=2)
            axes.plot(value, place, "o", color=MEASURED_COLOUR, ms=5)
            # a label near zero would cross the axis
            side = "left" if from_zero and value < 0.08 * limit else "center"
            options = {"textcoords": "offset points", "fontsize": 7, "ha": side}
            axes.annotate(figure(value), (value, place), (0, 5), **options)
        if (known := line.get(f"published {key}")) is not None:
            axes.plot(known, place, "D", mfc="none", color=PUBLISHED_COLOUR, ms=6)
    axes.set(xlabel=title_of(key), ylim=(len(summary) - 0.5, -0.7))
    axes.set_yticks(range(len(summary)), cells)
    axes.margins(x=0.2)
    axes.locator_params(axis="x", nbins=4)
    if from_zero:
        axes.set_xlim(0, limit)
    else:
        _widen(axes)
    axes.grid(axis="y", lw=0.4, alpha=0.5)


def _widen(axes: "Axes") -> None:
    """Show at least 1 % of the values from side to side, so that less does not look like much."""
    low, high = axes.get_xlim()
    missing = 0.01 * abs(low + high) / 2 - (high - low)
    if missing > 0:
        axes.set_xlim(low - missing / 2, high + missing / 2)


def _processes(study: Study, summary: Sequence[Mapping[str, Any]]) -> "Figure | None":
    """Draw rows/s over processes with ranges, the ideal line and published figures."""
    processes = {task.cell: task.processes for task in study.tasks}
    shown = [(processes[line["cell"]], line) for line in summary if line["rows_per_s"]]
    if not is_scaling(study) or not shown:
        return None
    canvas = new_canvas((5, 3.6), layout="constrained")
    axes, every = canvas.subplots(), sorted(processes.values())
    first, base = shown[0]
    ideal = [base["rows_per_s"] / first * count for count in every]
    axes.plot(every, ideal, "--", color="0.5", lw=1, label="ideal")
    for count, line in shown:
        ends = line["rows_per_s low"], line["rows_per_s high"]
        axes.vlines(count, *ends, color=MEASURED_COLOUR, lw=2)
        at, label = (count, line["rows_per_s"]), f"{line['efficiency']:.0%}"
        axes.annotate(label, at, (6, -10), textcoords="offset points", fontsize=8)
    medians = [(count, line["rows_per_s"]) for count, line in shown]
    label = "median, range, efficiency"
    axes.plot(*zip(*medians, strict=True), "o", color=MEASURED_COLOUR, ms=5, label=label)
    found = [(processes[line["cell"]], line.get("published rows_per_s")) for line in summary]
    if published := [point for point in found if point[1] is not None]:
        options = {"mfc": "none", "color": PUBLISHED_COLOUR, "ms": 6, "label": "published"}
        axes.plot(*zip(*published, strict=True), "D", **options)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(every, map(str, every))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set(xlabel="processes", ylabel="rows/s")
    axes.margins(x=0.12, y=0.12)
    axes.set_title(study.title, loc="left", fontsize=9)
    axes.grid(lw=0.4, alpha=0.5)
    axes.legend(fontsize=8)
    return canvas
