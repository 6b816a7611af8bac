"""How are figures and tables written? As text, Markdown and CSV, the same everywhere."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def figure(value: float) -> str:
    """Returns a value with four significant digits: 1.03, 255.4, 12,345."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}"


def percent(share: float) -> str:
    """Returns a share of 1 in per cent: 5 %, 97.5 %."""
    return f"{100 * share:.4g} %"


def interval(one: dict[str, Any]) -> str:
    """Returns a `value` with its `interval_95`: 255.4 [214.0, 305.7].

    An end that is not known is a question mark.
    """
    low, high = ("?" if end is None else figure(end) for end in one["interval_95"])
    return f"{figure(one['value'])} [{low}, {high}]"


def p_value(p: float) -> str:
    """Returns a p-value with three decimals, or <0.001."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def preview(text: str, width: int = 100) -> str:
    """Returns the beginning of a text on one line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Returns lines of cells as aligned columns, two blanks apart and indented by two."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    return "\n".join(f"  {line}".rstrip() for line in padded)


def without_empty_columns(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    """Returns a heading and its lines of cells without the columns that no line fills."""
    filled = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:])]
    return [[line[i] for i in filled] for line in lines]


def markdown(lines: Sequence[Sequence[str]]) -> list[str]:
    """Returns a heading and its lines of cells as the lines of a Markdown table."""
    marked = [
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    ]
    return [marked[0], "|" + " --- |" * len(lines[0]), *marked[1:]]


def read_csv(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a CSV file; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def counted(number: float, thing: str) -> str:
    """Returns `1 epoch` or `2.5 epochs`."""
    return f"1 {thing}" if number == 1 else f"{number:.15g} {thing}s"


def write_csv(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write lines whose columns may differ; an absent cell is empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(
            file, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(lines)
