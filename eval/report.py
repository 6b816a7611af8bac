"""May these runs be compared, and how do they compare? Speed, memory, losses and scores of runs.

python eval/report.py --runs runs --out results/report [--axis lora_r lora_target_modules]
    [--reference runs/x] [--scored_on data/other.jsonl] [--allow-confounded]

Reads run.json and what eval/ wrote beside it. Writes OUT/report.md, runs.csv and plots (PNG and
SVG). Refuses runs that differ in more than the axis explains; sftlab/comparison/comparability.py
knows what follows from which axis.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sftlab.comparison.output_folder import check_output_folder, claim_output_folder
from sftlab.comparison.plots import draw_comparison
from sftlab.comparison.run_comparison import (
    COLUMNS,
    IF_SCORED,
    SHOWN,
    Comparison,
    against_reference,
    check_comparable,
    portable,
    shared_facts,
)
from sftlab.comparison.run_results import RunResults, find_runs, read_results
from sftlab.evaluation.preference_words import SCORES as PREFERENCE_SCORES
from sftlab.evaluation.text_metrics import NAMES
from sftlab.exit_messages import mistakes_in_one_line, short
from sftlab.runs.run_directory import SIDES, START
from sftlab.script_options import Options
from sftlab.tables import (
    aligned,
    interval,
    markdown,
    p_value,
    preview,
    without_empty_columns,
    write_csv,
)

HEADING = "# Runs side by side"
# What the terminal has room for.
BRIEF = ("tokens_per_s", "peak_memory_gb", "train_loss", "validation_loss")

Table = list[list[str]]


def main(argv: list[str]) -> None:
    """Read, check, compare, write, print."""
    arguments = parsed(argv)
    out = arguments.out
    try:
        check_output_folder(out, "report.md", HEADING)
        found = {
            name: read_results(path, arguments.scored_on)
            for name, path in find_runs(arguments.runs).items()
        }
        if arguments.scored_on:
            check_scored_alike(found, arguments.scored_on)
        comparison = check_comparable(found, arguments.axis, arguments.allow_confounded)
        against = against_reference(comparison, arguments.reference)
    except ValueError as error:
        sys.exit(short(f"error: {portable(str(error))}"))
    claim_output_folder(out, "report.md", f"{HEADING}\n")
    plots = draw_comparison(comparison, out)
    write_csv(out / "runs.csv", list(comparison.rows.values()))
    page = as_markdown(comparison, against, plots, argv)
    (out / "report.md").write_text(portable(page), encoding="utf-8")
    print(portable(as_text(comparison, against)))
    written = ["report.md", "runs.csv", *(f"{plot}.png/.svg" for plot in plots)]
    print(f"\nwritten to {out}: {', '.join(written)}")


def parsed(argv: list[str]) -> argparse.Namespace:
    """Returns the command line's options."""
    parser = Options(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--runs", nargs="+", type=Path, required=True, help="run directories, or folders of them")
    add("--out", type=Path, default=Path("results/report"), help="where the report is written")
    add(
        "--axis",
        nargs="+",
        default=[],
        metavar="FIELD",
        help="what is compared (default: inferred)",
    )
    add(
        "--scored_on",
        metavar="DATASET",
        help="compare scores of this data set, given as --dataset_name of eval/quality.py "
        "(default: those of each run's test split)",
    )
    add("--reference", type=Path, help="the run that the tuned models are compared with")
    add(
        "--allow-confounded",
        action="store_true",
        help="show runs that differ in more than the axis, marked so",
    )
    return parser.parse_args(argv)


def as_markdown(
    comparison: Comparison, against: tuple[str, Table], plots: list[str], argv: list[str]
) -> str:
    """Returns the text of report.md."""
    lines = [HEADING, "", *unexplained(comparison)]
    lines += ["```", f"python eval/report.py {shlex.join(argv)}", "```", ""]
    lines += [*(f"- {fact}" for fact in [*shared_facts(comparison), *comparison.notes]), ""]
    lines += [f"**Warning:** {warning}\n" for warning in comparison.warnings]
    lines += ["## Runs", "", *grid(table(comparison, list(COLUMNS)))]
    lines += pictures(plots, "speed", "memory", "losses")
    if any(one.quality or one.texts or one.tasks or one.judged for one in comparison.runs.values()):
        lines += [f"## Base and tuned on {scored_rows(comparison)}", ""]
        lines += [*grid(table(comparison, [], scores(comparison))), *pictures(plots, "quality")]
        lines += [
            "In brackets are 95 % intervals: the score interval of the scale and bootstrap-t "
            "over rows. Intervals and p-values say how far other "
            "rows could move a score. They do not say how far another training seed would.\n"
        ]
    if preferences := preference_table(comparison):
        lines += ["## What preference tuning gained and lost", "", *grid(preferences)]
        lines += [
            "Of `eval/preferences.py`: in brackets 95 % intervals over questions; p after Holm "
            "over the scores of a run. Start is the model that the run went on from.\n"
        ]
    said, differences = against
    if differences:
        title, _, explained = said.partition(": ")
        lines += [f"## {title}", "", f"{explained}.", "", *grid(differences)]
    elif said:
        lines += [f"{said}.", ""]
    return "\n".join(lines)


def as_text(comparison: Comparison, against: tuple[str, Table]) -> str:
    """Returns the report for the terminal."""
    lines = [*unexplained(comparison), *shared_facts(comparison), *comparison.notes]
    lines += ["", aligned(table(comparison, BRIEF, [f"tuned {score}" for score in SHOWN]))]
    if preferences := preference_table(comparison):
        lines += ["", aligned(preferences)]
    said, differences = against
    if differences:
        lines += ["", aligned(differences)]
    lines += [said] if said else []
    return "\n".join([*lines, *(f"warning: {warning}" for warning in comparison.warnings)])


def check_scored_alike(runs: Mapping[str, RunResults], dataset: str) -> None:
    """Raise ValueError where a run has no scores of a data set, or scores of other rows of it."""
    if without := [name for name, one in runs.items() if not one.quality]:
        raise ValueError(
            f"{', '.join(without)} {'have' if len(without) > 1 else 'has'} no scores of {dataset}: "
            f"run eval/quality.py --run RUN --dataset_name {dataset} first"
        )
    if len({one.quality["held_out"]["fingerprint"] for one in runs.values()}) > 1:
        raise ValueError(
            f"the runs were scored on other rows of {dataset}, which has changed between: score "
            "them again"
        )


def scored_rows(comparison: Comparison) -> str:
    """Returns what the rows are called that the scores are of."""
    found = (one.quality.get("held_out", {}) for one in comparison.runs.values())
    named = {rows["dataset"] for rows in found if "dataset" in rows}
    others = {name for name in named if not name.endswith(", test split")}
    return f"the rows of {', '.join(sorted(others))}" if others else "held-out rows"


def unexplained(comparison: Comparison) -> list[str]:
    """Returns the lines that mark runs which differ in more than the axis."""
    if not comparison.unexplained:
        return []
    mark = "**CONFOUNDED**: these runs differ in more than the axis, in"
    return [mark, "", *(f"- {line}" for line in comparison.unexplained), ""]


def grid(lines: Table) -> list[str]:
    """Returns a table's lines in Markdown."""
    return [*markdown(lines), ""]


def pictures(plots: list[str], *names: str) -> list[str]:
    """Returns the lines that show those plots that were drawn."""
    return [line for name in names if name in plots for line in (f"![{name}]({name}.svg)", "")]


def scores(comparison: Comparison) -> list[str]:
    """Returns the score columns of the report: those of SHOWN, then harness and judges."""
    shown = [f"{side} {score}" for score in (*SHOWN, IF_SCORED) for side in SIDES]
    known = {f"{side} {score}" for score in NAMES for side in SIDES}
    found = dict.fromkeys(
        key.removesuffix(" low").removesuffix(" high")
        for row in comparison.rows.values()
        for key in row
        if key.startswith(tuple(SIDES))
    )
    return shown + [key for key in found if key not in known]


def preference_table(comparison: Comparison) -> Table:
    """Returns a heading and a row for each score of eval/preferences.py; [] without any."""
    lines = [["run", "score", "base", "start", "tuned", "difference", "p"]]
    for name, one in comparison.runs.items():
        for score, found in one.preferences.get("scores", {}).items():
            sides = ("base", START, "tuned", "difference")
            cells = [interval(found[side]) if side in found else "" for side in sides]
            called = PREFERENCE_SCORES.get(score, score)
            lines.append([name, called, *cells, p_value(found["p_holm"])])
    return without_empty_columns(lines) if len(lines) > 1 else []


def table(comparison: Comparison, columns: Sequence[str], scores: Sequence[str] = ()) -> Table:
    """Returns a heading and a row a run; columns without any value are left out."""
    headings = [COLUMNS[key][0] for key in columns]
    for side, _, score in (name.partition(" ") for name in scores):
        headings.append(f"{side} {NAMES.get(score, score)}")
    lines = [["run", "status", *comparison.axes, *headings]]
    for name, row in comparison.rows.items():
        why = "" if row["status"] == "out of memory" else preview(row["reason"], 60)
        cells = [name, f"{row['status']}: {why}" if why else row["status"]]
        cells += [row[f"axis {axis}"] for axis in comparison.axes]
        for key in columns:
            cells.append("" if row[key] in (None, "") else COLUMNS[key][1].format(row[key]))
        for score in scores:
            ends = [row.get(f"{score} {end}") for end in ("low", "high")]
            one = {"value": row.get(score), "interval_95": ends}
            cells.append("" if one["value"] is None else interval(one))
        lines.append(cells)
    return without_empty_columns(lines)


if __name__ == "__main__":
    with mistakes_in_one_line():
        main(sys.argv[1:])
