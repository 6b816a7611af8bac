"""How does the choice of a learning rate look as a plot?"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sftlab.comparison.canvas import new_canvas, save, style
from sftlab.comparison.study_file import Study
from sftlab.comparison.study_tuning import Trial

# losses above this many times the lowest one are not drawn
MOST_SHOWN = 1.5
# of a cell's best loss, what is left above it; and the ratio from which an axis is logarithmic
ROOM, WIDE = 1.1, 3


def draw_tuning(study: Study, tried: Sequence[Trial], out: Path) -> list[str]:
    """Draw the validation loss over the tuned value, a line a cell. Returns the plot's name."""
    import matplotlib

    name = f"{study.name}_tuning"
    with style():
        canvas = new_canvas((6, 3.8), layout="constrained")
        axes = canvas.subplots()
        colours = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.9, len(study.cells)))
        low, high = shown_losses(tried)
        beyond = False
        for colour, cell in zip(colours, study.cells, strict=True):
            mine = [one for one in tried if one.cell == cell and one.validation_loss is not None]
            values, losses = [one.value for one in mine], [one.validation_loss for one in mine]
            axes.plot(values, losses, "o-", ms=3, lw=1.2, color=colour, label=cell)
            for place in (place for place, one in enumerate(mine) if one.best):
                axes.plot(values[place], losses[place], "o", ms=8, mfc="none", color=colour)
            for one in (one for one in tried if one.cell == cell):
                if one.validation_loss is None or one.validation_loss > high:
                    axes.plot(one.value, high, "x", ms=6, color=colour, clip_on=False)
                    beyond = True
        axes.set(xlabel=study.tuned, ylabel="validation loss", xscale="log", ylim=(low, high))
        if _is_wide(low, high):
            axes.set_yscale("log")
        said = "Validation loss of each cell; circles: its best"
        said += "; crosses: far higher, or diverged" * beyond
        title = f"{textwrap.fill(study.title, 90)}\n{textwrap.fill(said, 90)}"
        canvas.suptitle(title, x=0.01, ha="left", fontsize=9)
        canvas.legend(loc="outside right center", frameon=False)
        save(canvas, out, name)
    return [name]


def shown_losses(tried: Sequence[Trial]) -> tuple[float, float]:
    """Returns the ends of an axis that holds the losses of all trainings that went well.

    One that went wrong would press all the others into one line: losses do not count that are more
    than 1.5 times the lowest one, and than 1.1 times each cell's best.
    """
    shown = [one.validation_loss for one in tried if one.validation_loss is not None]
    bests = [one.validation_loss for one in tried if one.best and one.validation_loss is not None]
    low = min(shown, default=0.0)
    most = max([MOST_SHOWN * low, *(ROOM * one for one in bests)])
    high = max((loss for loss in shown if loss <= most), default=low)
    room = 0.08 * (high - low) or 0.01 * high or 1.0
    return (low / ROOM if _is_wide(low, high) else low - room), high + room


def _is_wide(low: float, high: float) -> bool:
    """Returns whether losses are told apart on a logarithmic axis alone."""
    return 0 < WIDE * low < high
