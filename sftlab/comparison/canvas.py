"""What do all plots share? Their style, and how they are written.

matplotlib is imported only when something is drawn.
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = {
    "svg.hashsalt": "sftlab",
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
}


def style() -> AbstractContextManager:
    """Returns a context in which plots look alike, and SVGs are the same bytes for one figure."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def new_canvas(size: tuple[float, float], **options: Any) -> "Figure":
    """Returns an empty figure of a width and height in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, **options)


def save(canvas: "Figure", out: Path, name: str) -> None:
    """Write PNG and SVG, the same bytes for the same figure."""
    canvas.savefig(out / f"{name}.svg", metadata={"Date": None})
    canvas.savefig(out / f"{name}.png", dpi=150)
