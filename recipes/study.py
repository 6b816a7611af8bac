"""Train every cell of a study in turn, and write what they say together: tables and plots with
median and range.

python recipes/study.py recipes/studies/lora_rank.yaml [--recipe RECIPE.yaml] [--launch LAUNCH]
    [--out results/lora_rank] [--dry-run] [--at_once n] [--task i] [--any_field value]
python recipes/study.py recipes/studies/precision.yaml --random llama3.2-1b     (speed and memory need no weights)

A study file has an `axis` (fields in which cells may differ; sftlab/comparison/comparability.py
knows what follows from them), `cells` (each with recipe fields and `launch`, `processes`, `flags`
of its own), `seeds` or `repeats`, the `recipe`, `fields` for all, the `reference` cell (the first),
`quality: true` for eval/quality.py on every run, and `published` figures. Repeats are interleaved.
Started again, it skips what is done; what was broken off or failed is trained anew; memory that ran
out is a result. `--at_once n` starts n trainings beside each other and times them in turn
(sftlab/comparison/timed_turns.py), where the memory has room for them. `--task i` trains the i-th
alone (from 0, for a SLURM array), writes no tables.
"""

import sftlab.startup.filter_warnings  # noqa: F401, I001  (before the libraries that it quiets)

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sftlab.comparison.run_results import about, read_evidence
from sftlab.comparison.study_file import GIVEN, Study, check, load
from sftlab.comparison.study_summary import (
    COUNTS,
    MEASURED,
    TITLES,
    claims,
    claims_table,
    collect,
    effects,
    effects_table,
    is_scaling,
    summarise,
    table,
)
from sftlab.comparison.study_tasks import (
    ROOT,
    Task,
    begin,
    failures,
    gpus_needed,
    is_done,
    not_begun,
    python_command,
    ran_out,
    result,
)
from sftlab.comparison.timed_turns import Command, in_turn
from sftlab.runs.run_directory import read_run
from sftlab.tables import aligned, figure, markdown, write_csv

# Each in its panel: the first of a line that was measured.
PLOTTED = (
    ("published rows_per_s", "tokens_per_s"),
    ("step_activations_gb",),
    ("published peak_memory_gb", "step_peak_gb", "peak_memory_gb"),
    ("train_loss",),
    ("tuned response_perplexity",),
    ("tuned bleu",),
)
MANY_CELLS = 12
STYLE = {
    "svg.hashsalt": "sftlab",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
}
MEASURED_COLOUR, PUBLISHED_COLOUR = "#0072B2", "#D55E00"
# What the terminal has no room for.
LONG = ("rows_per_s", "share_of_limit", "validation_loss", "tuned rougeL")


def main(argv: list[str]) -> None:
    """Check, train what is not done, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("study", type=Path)
    parser.add_argument("--recipe", help="another recipe than the study's")
    parser.add_argument("--launch", help="another launch config than the study's, by name or path")
    parser.add_argument(
        "--processes", type=int, help="processes of every cell that names none itself"
    )
    parser.add_argument(
        "--random",
        metavar="SHAPE",
        help="random-initialised weights of this shape, and random rows",
    )
    parser.add_argument(
        "--runs", type=Path, help="where the runs are kept (default: runs/study-NAME)"
    )
    parser.add_argument(
        "--out", type=Path, help="where tables and plots go (default: results/NAME)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    parser.add_argument(
        "--at_once", type=int, default=1, help="trainings that start together; each is timed alone"
    )
    parser.add_argument("--task", type=int, help="train this one alone")
    parser.add_argument("--no_train", action="store_true", help="write the tables of what is there")
    parser.add_argument(
        "--allow-confounded",
        action="store_true",
        help="show cells that differ in more than the axis",
    )
    arguments, rest = parser.parse_known_args(argv)
    try:
        given = recipe_fields(rest) | {key: getattr(arguments, key) for key in GIVEN}
        study = load(
            arguments.study, arguments.runs or Path("runs") / f"study-{arguments.study.stem}", given
        )
        if not arguments.allow_confounded:
            check(study)
        if arguments.dry_run:
            return print("\n".join(shlex.join(task.command()) for task in study.tasks))
        if arguments.task is not None and not 0 <= arguments.task < len(study.tasks):
            raise ValueError(
                f"--task {arguments.task}: the study has tasks 0 to {len(study.tasks) - 1}"
            )
        if arguments.at_once < 1:
            raise ValueError(f"--at_once {arguments.at_once}: one training at least")
        tasks = study.tasks if arguments.task is None else [study.tasks[arguments.task]]
        not_run = (
            not_begun(tasks)
            if arguments.no_train
            else train(tasks, arguments.at_once, study.random)
        )
        unscored = [str(task.folder / "log") for task in tasks if study.quality and not score(task)]
        if arguments.task is None:
            write(
                study,
                not_run,
                arguments.out or Path("results") / study.name,
                arguments.allow_confounded,
                argv,
            )
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: start the same command again to go on")
    if arguments.task is not None and not is_done(tasks[0]):
        sys.exit(f"error: {tasks[0].name}: {not_run.get(tasks[0].name) or result(tasks[0])}")
    if unscored:
        sys.exit(f"error: eval/quality.py failed, see {', '.join(unscored)}")
    if failed := failures(tasks, not_run):
        sys.exit(f"error: no result of {len(failed)} of {len(tasks)}: {'; '.join(failed)}")


def recipe_fields(words: list[str]) -> dict[str, Any]:
    """`--field value ...` pairs to fields; several values are a list."""
    found: dict[str, Any] = {}
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            found[name] = [value] if value else []
        elif not found:
            raise ValueError(f"{word}: expected --field value")
        else:
            found[name].append(word)
    return {
        name: values[0] if len(values) == 1 else values or "true" for name, values in found.items()
    }


def train(
    tasks: list[Task], at_once: int = 1, random: tuple[str, int] | None = None
) -> dict[str, str]:
    """Train what is not done and has the GPUs it needs; why the others were not run, by name.

    `at_once` trainings start beside each other and are timed in turn. `random` says which random
    model and rows to make first.
    """
    import torch

    gpus, not_run, todo = torch.cuda.device_count(), {}, []
    places = {
        task.name: f"[{number}/{len(tasks)}] {task.name}"
        for number, task in enumerate(tasks, start=1)
    }
    for task in tasks:
        if is_done(task):
            print(f"{places[task.name]}: {result(task)}; done before", flush=True)
        elif gpus_needed(task) > gpus:
            not_run[task.name] = f"it needs {gpus_needed(task)} GPUs"
            print(
                f"{places[task.name]}: not run, {not_run[task.name]}, this machine shows {gpus}",
                flush=True,
            )
        else:
            todo.append(task)
    if todo and random:
        from sftlab.models.random_models import make_random_files  # it takes transformers with it

        make_random_files(*random)
    began = said_at = time.monotonic()
    ended = 0
    while todo:
        group, todo = todo[:at_once], todo[at_once:]
        for task in group:
            begin(task, beside=len(group) - 1)
        for place in in_turn(
            [Command(python_command(t), t.folder / "log") for t in group], cwd=ROOT
        ):
            took, said_at, ended = time.monotonic() - said_at, time.monotonic(), ended + 1
            left = (said_at - began) / ended * (len(group) - place - 1 + len(todo))
            said = f"{places[group[place].name]}: {result(group[place])}"
            print(f"{said}; {took:.0f} s, about {left / 60:.0f} min left", flush=True)
        if again := [task for task in group if len(group) > 1 and ran_out(task)]:
            print(
                "out of memory beside others, so each alone again: "
                f"{', '.join(t.name for t in again)}",
                flush=True,
            )
            not_run |= train(again)
    return not_run


def score(task: Task) -> bool:
    """Evaluate a run that succeeded and has no scores of its own.

    Whether nothing is missing then.
    """
    if not (task.folder / "adapter").is_dir() or read_evidence(task.folder).quality:
        return True
    print(f"{task.name}: base and tuned on the held-out rows", flush=True)
    with (task.folder / "log").open("a", encoding="utf-8") as log:
        command = [sys.executable, "eval/quality.py", "--run", str(task.folder)]
        return (
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode == 0
        )


def write(
    study: Study, not_run: dict[str, str], out: Path, allow_confounded: bool, argv: list[str]
) -> None:
    """Tables and plots."""
    rows, confounders = collect(study, not_run, allow_confounded)
    summary, said = summarise(study, rows), claims(study, rows)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "runs.csv", rows)
    write_csv(out / "summary.csv", summary)
    changed = effects(study, summary)
    plots = draw(study, summary, out)
    facts = next(
        (about(read_run(t.folder)) for t in study.tasks if (t.folder / "run.json").is_file()), {}
    )
    lines = [
        f"# {study.name}",
        "",
        *(["**CONFOUNDED**: the cells differ in", *confounders, ""] if confounders else []),
    ]
    lines += [
        "```",
        f"python recipes/study.py {shlex.join(w for w in argv if w != '--no_train')}",
        "```",
        "",
    ]
    lines += [
        *(f"- {key}: {value}" for key, value in facts.items()),
        f"- axis: {', '.join(study.axis)}",
        "",
    ]
    known = f" Published: {study.published_as}." if study.published and study.published_as else ""
    lines += [f"Median of the runs, lowest and highest in brackets.{known}", ""]
    lines += [*markdown(table(summary)), ""]
    if changed:
        above = "With a technique over without it, all else equal: median of the pairs, lowest and highest"
        lines += [f"{above}; ↑ and ↓ from {COUNTS:.0%}:", ""]
        lines += [*markdown(effects_table(changed)), ""]
    if said:
        lines += [
            f"Against {study.reference}, pairs of equal seed, 95 % intervals, p after Holm:",
            "",
        ]
        lines += [*markdown(claims_table(said)), ""]
    lines += [line for plot in plots for line in (f"![{plot}]({plot}.svg)", "")]
    (out / "study.md").write_text("\n".join(lines), encoding="utf-8")
    brief = [{k: v for k, v in line.items() if k not in LONG} for line in summary]
    print(
        "",
        aligned(table(brief)),
        *([aligned(claims_table(said))] if said else []),
        *([aligned(effects_table(changed))] if changed else []),
        sep="\n",
    )
    print(
        f"\nwritten to {out}: study.md, runs.csv, summary.csv, "
        f"{', '.join(f'{plot}.png/.svg' for plot in plots)}"
    )


def draw(study: Study, summary: list[dict[str, Any]], out: Path) -> list[str]:
    """Write what there is to see as PNG and SVG; the names of the plots."""
    names = []
    with matplotlib.rc_context(STYLE):
        for end, canvas in (
            ("", _cells(study, summary)),
            ("_over_processes", _processes(study, summary)),
        ):
            if canvas is None:
                continue
            names.append(study.name + end)
            for suffix, more in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
                canvas.savefig(out / f"{names[-1]}.{suffix}", **more)
            plt.close(canvas)
    return names


def _cells(study: Study, summary: Sequence[Mapping[str, Any]]) -> Figure | None:
    """A panel a figure that was measured: points with ranges, published ones hollow."""
    found = [
        [key for key in keys if any(line.get(key) is not None for line in summary)][:1]
        for keys in PLOTTED
    ]
    shown = [key.removeprefix("published ") for keys in found for key in keys]
    if not shown:
        return None
    columns = len(shown) if len(summary) > MANY_CELLS else min(3, len(shown))
    deep = -(-len(shown) // columns)
    size = (
        3.2 * columns + 0.06 * max(map(len, study.cells)),
        (1.2 + 0.28 * len(summary)) * deep + 0.4,
    )
    canvas, panels = plt.subplots(deep, columns, figsize=size, squeeze=False, sharey=True)
    for key, axes in zip(shown, panels.flat, strict=False):
        from_zero = key != "train_loss" and key in MEASURED
        known = [line.get(f"published {key}") or 0 for line in summary]
        limit = 1.2 * max(*known, *(line[f"{key} high"] or 0 for line in summary)) or 1
        for place, line in enumerate(summary):
            if line[key] is not None:
                axes.hlines(
                    place, line[f"{key} low"], line[f"{key} high"], color=MEASURED_COLOUR, lw=2
                )
                axes.plot(line[key], place, "o", color=MEASURED_COLOUR, ms=5)
                side = (
                    "left" if from_zero and line[key] < 0.08 * limit else "center"
                )  # not across the axis
                at = (line[key], place)
                axes.annotate(
                    figure(line[key]), at, (0, 5), textcoords="offset points", fontsize=7, ha=side
                )
            if (known := line.get(f"published {key}")) is not None:
                axes.plot(known, place, "D", mfc="none", color=PUBLISHED_COLOUR, ms=6)
        axes.set(xlabel=TITLES[key], ylim=(len(summary) - 0.5, -0.7))
        axes.set_yticks(range(len(summary)), study.cells)
        axes.margins(x=0.2)
        axes.locator_params(axis="x", nbins=4)
        if from_zero:
            axes.set_xlim(0, limit)
        else:
            widen(axes)
        axes.grid(axis="y", lw=0.4, alpha=0.5)
    for axes in panels.flat[len(shown) :]:
        axes.axis("off")
    conditions = f", {study.published_as}" if study.published_as else ""
    known = (
        f"; diamonds: published{conditions}"
        if any(f"published {key}" in summary[0] for key in shown)
        else ""
    )
    said = f"{study.name} (circles: median, lines: range of the runs{known})"
    canvas.suptitle(said, x=0.01, ha="left", fontsize=9)
    canvas.tight_layout()
    return canvas


def widen(axes: Axes) -> None:
    """At least a hundredth of the values from side to side: what differs by less looks the same."""
    low, high = axes.get_xlim()
    missing = 0.01 * abs(low + high) / 2 - (high - low)
    if missing > 0:
        axes.set_xlim(low - missing / 2, high + missing / 2)


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
        axes.vlines(
            count, line["rows_per_s low"], line["rows_per_s high"], color=MEASURED_COLOUR, lw=2
        )
        axes.annotate(
            f"{line['efficiency']:.0%}", at, (6, -10), textcoords="offset points", fontsize=8
        )
    medians = [(count, line["rows_per_s"]) for count, line in shown]
    axes.plot(
        *zip(*medians, strict=True),
        "o",
        color=MEASURED_COLOUR,
        ms=5,
        label="median, range, efficiency",
    )
    known = [(processes[line["cell"]], line.get("published rows_per_s")) for line in summary]
    if known := [point for point in known if point[1] is not None]:
        axes.plot(
            *zip(*known, strict=True),
            "D",
            mfc="none",
            color=PUBLISHED_COLOUR,
            ms=6,
            label="published",
        )
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


if __name__ == "__main__":
    main(sys.argv[1:])
