"""Plots of a study: a panel a figure with a row a cell, and rows/s over processes where those are the axis."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from sftlab.study import Study
from sftlab.summary import MEASURED, is_scaling
from sftlab.table import figure

TITLES = {
    "tokens_per_s": "real tokens/s", "rows_per_s": "rows/s", "efficiency": "efficiency",
    "share_of_limit": "share of the limit", "peak_memory_gb": "peak GB a rank", "step_time_s": "step s",
    "step_parameters_gb": "parameters GB", "step_gradients_gb": "gradients GB",
    "step_optimizer_state_gb": "optimizer state GB", "step_activations_gb": "activations GB",
    "step_peak_gb": "a step's peak GB", "collectives": "collectives a step", "collectives_mb": "their MB",
    "trainable_parameters": "trainable parameters", "train_loss": "train loss",
    "largest_loss_difference": "largest loss difference", "validation_loss": "validation loss",
    "tuned response_perplexity": "perplexity of the response", "tuned bleu": "BLEU", "tuned rougeL": "ROUGE-L",
}  # fmt: skip
# Each in its panel: the first of a line that was measured.
PLOTTED = (
    ("published rows_per_s", "tokens_per_s"), ("step_activations_gb",), ("step_peak_gb", "peak_memory_gb"),
    ("train_loss",), ("tuned response_perplexity",), ("tuned bleu",),
)  # fmt: skip
MANY_CELLS = 12
STYLE = {"svg.hashsalt": "sftlab", "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
MEASURED_COLOUR, PUBLISHED_COLOUR = "#0072B2", "#D55E00"


def draw(study: Study, summary: list[dict[str, Any]], out: Path) -> list[str]:
    """Write what there is to see as PNG and SVG; the names of the plots."""
    names = []
    with matplotlib.rc_context(STYLE):
        for end, canvas in (("", _cells(study, summary)), ("_over_processes", _processes(study, summary))):
            if canvas is None:
                continue
            names.append(study.name + end)
            for suffix, more in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
                canvas.savefig(out / f"{names[-1]}.{suffix}", **more)
            plt.close(canvas)
    return names


def _cells(study: Study, summary: Sequence[Mapping[str, Any]]) -> Figure | None:
    """A panel a figure that was measured: points with ranges, published ones hollow."""
    found = [[key for key in keys if any(line.get(key) is not None for line in summary)][:1] for keys in PLOTTED]
    shown = [key.removeprefix("published ") for keys in found for key in keys]
    if not shown:
        return None
    columns = len(shown) if len(summary) > MANY_CELLS else min(3, len(shown))
    deep = -(-len(shown) // columns)
    size = (3.2 * columns + 0.06 * max(map(len, study.cells)), (1.2 + 0.28 * len(summary)) * deep + 0.4)
    canvas, panels = plt.subplots(deep, columns, figsize=size, squeeze=False, sharey=True)
    for key, axes in zip(shown, panels.flat, strict=False):
        for place, line in enumerate(summary):
            if line[key] is not None:
                axes.hlines(place, line[f"{key} low"], line[f"{key} high"], color=MEASURED_COLOUR, lw=2)
                axes.plot(line[key], place, "o", color=MEASURED_COLOUR, ms=5)
                at = (line[key], place)
                axes.annotate(figure(line[key]), at, (0, 5), textcoords="offset points", fontsize=7, ha="center")
            if (known := line.get(f"published {key}")) is not None:
                axes.plot(known, place, "D", mfc="none", color=PUBLISHED_COLOUR, ms=6)
        axes.set(xlabel=TITLES[key], ylim=(len(summary) - 0.5, -0.7))
        axes.set_yticks(range(len(summary)), study.cells)
        axes.margins(x=0.2)
        axes.locator_params(axis="x", nbins=4)
        if key != "train_loss" and key in MEASURED:
            axes.set_xlim(0, 1.2 * max(line[f"{key} high"] or 0 for line in summary) or 1)
        axes.grid(axis="y", lw=0.4, alpha=0.5)
    for axes in panels.flat[len(shown) :]:
        axes.axis("off")
    circle = "circles: median, lines: range of the runs"
    known = "; diamonds: published" if study.published else ""
    canvas.suptitle(f"{study.name} ({circle}{known})", x=0.01, ha="left", fontsize=9)
    canvas.tight_layout()
    return canvas


def _processes(study: Study, summary: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Rows/s over processes with ranges, the ideal line and published points."""
    processes = {task.cell: task.processes for task in study.tasks}
    shown = [(processes[line["cell"]], line) for line in summary if line["rows_per_s"]]
    if not is_scaling(study) or not shown:
        return None
    canvas, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
    every, (first, base) = sorted(processes.values()), shown[0]
    ideal = [base["rows_per_s"] / first * count for count in every]
    axes.plot(every, ideal, "--", color="0.5", lw=1, label="ideal")
    for count, line in shown:
        at = (count, line["rows_per_s"])
        axes.vlines(count, line["rows_per_s low"], line["rows_per_s high"], color=MEASURED_COLOUR, lw=2)
        axes.annotate(f"{line['efficiency']:.0%}", at, (6, -10), textcoords="offset points", fontsize=8)
    medians = [(count, line["rows_per_s"]) for count, line in shown]
    axes.plot(*zip(*medians, strict=True), "o", color=MEASURED_COLOUR, ms=5, label="median, range, efficiency")
    known = [(processes[line["cell"]], line.get("published rows_per_s")) for line in summary]
    if known := [point for point in known if point[1] is not None]:
        axes.plot(*zip(*known, strict=True), "D", mfc="none", color=PUBLISHED_COLOUR, ms=6, label="published")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(every, map(str, every))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set(xlabel="processes", ylabel="rows/s")
    axes.margins(x=0.12, y=0.12)
    axes.set_title(study.name, loc="left", fontsize=9)
    axes.grid(lw=0.4, alpha=0.5)
    axes.legend(fontsize=8)
    return canvas
