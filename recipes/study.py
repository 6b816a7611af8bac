"""What does one setting change? Train every cell of a study, and write medians, ranges and plots.

python recipes/study.py recipes/studies/lora_rank.yaml [--recipe RECIPE.yaml] [--launch LAUNCH]
    [--out FOLDER] [--dry-run] [--at_once n] [--task i] [--any_field value]
python recipes/study.py recipes/studies/lora_rank.yaml --power [--deviation 1.5] [--difference 2]
    (trains nothing: how many seeds and test rows would show a difference?)
python recipes/study.py recipes/studies/precision.yaml --random llama3.2-1b
    (speed and memory need no real weights)

A study file has these keys:
- `recipe`, and `fields` that override it in every cell
- `axis`: the fields in which cells may differ (what follows from them may differ too)
- `cells`: each with recipe fields and, if it has them, `launch`, `processes` and `flags` of its own
- `seeds` or `repeats`, which are interleaved
- `speed: false` trains without turns where speed is not the question; its tables have none
- `tune`: one field with a list of values. Each cell is trained at each value with the first seed,
  and with the other seeds at its own best value by the validation loss
- `reference`: the cell that the others are compared with (the first)
- `quality: true` runs eval/quality.py on every run, with `quality_options: {samples: 200}`, and
  on `known_text`, a file of text that the base model knew: what did the tuning forget?
- `harness: {tasks: [arc_easy], limit: 200}` runs eval/harness.py on every run
- `published`: figures to show beside the measured ones

Tables and plots go beside the runs, into runs/study-NAME, unless `--out` names another folder.
Tables of other runs are not replaced.

Start the same command again after an interruption: it skips what is done and trains the rest.
Memory that ran out counts as a result. `--at_once n` starts n trainings together and times them one
after the other (sftlab/comparison/timed_turns.py), where the memory has room for them. Evaluations,
which are not timed, run n beside one another. `--task i`
trains the i-th alone (from 0, for a SLURM array) and writes no tables. Of a study that tunes, the
trainings that choose the values come first.
"""

import sftlab.startup.filter_warnings  # noqa: F401, I001  (before the libraries that it quiets)

import argparse
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sftlab.comparison.output_folder import claim_output_folder
from sftlab.comparison.plots import draw_study
from sftlab.comparison.run_results import RunResults, perplexity_of, read_results
from sftlab.comparison.study_checks import (
    check_different,
    check_fields,
    check_options,
    check_recipes,
)
from sftlab.comparison.study_file import GIVEN, Study, check_comparable, load
from sftlab.comparison.study_output import RUNS_LINE, check_not_emptied, check_output
from sftlab.comparison.study_claims import claims, finding_lines, least_found_line
from sftlab.comparison.study_page import heading, result_lines, tuning_lines, unreached_line
from sftlab.comparison.study_power import deviations, power_table, rows_needed, seeds_needed
from sftlab.comparison.study_summary import collect, effects, summarise
from sftlab.comparison.study_tables import claims_table, effects_table, summary_table, title_of
from sftlab.comparison.study_tasks import (
    Task,
    begin,
    failures,
    gpus_needed,
    is_done,
    not_begun,
    python_command,
    ran_out_of_memory,
    result,
)
from sftlab.comparison.study_tuning import at_best, trials, tuning_rows, tuning_table
from sftlab.comparison.timed_turns import Command, environment_beside, in_turn
from sftlab.comparison.tuning_plot import draw_tuning
from sftlab.exit_messages import mistakes_in_one_line, short
from sftlab.field_words import field_name, field_words
from sftlab.paths import ROOT
from sftlab.script_options import Options
from sftlab.tables import aligned, counted, write_csv

# exit statuses of an evaluation that was told to stop, and the signal
STOPPED = {code: s for s in (signal.SIGINT, signal.SIGTERM) for code in (-s, 128 + s)}
# What the terminal has no room for.
LONG = ("rows_per_s", "share_of_limit", "validation_loss", "tuned rougeL")


def main(argv: list[str]) -> None:
    """Check, train what is not done, write."""
    arguments, fields = parsed(argv)
    try:
        given = recipe_fields(fields) | {key: getattr(arguments, key) for key in GIVEN}
        runs = arguments.runs or Path("runs") / f"study-{arguments.study.stem}"
        study = load(arguments.study, runs, given)
        out = arguments.out or runs
        check_options(study, arguments)
        check_fields(study)
        if not arguments.allow_confounded:
            check_comparable(study)
        check_different(study)
        if not (arguments.power or arguments.no_train):
            check_recipes(study)
        if arguments.dry_run:
            return print("\n".join(commands(study)))
        if arguments.power:
            return print("\n".join(power_lines(study, arguments)))
        if arguments.task is None:
            check_output(out, runs)
        study = tune(study, arguments)
        tasks = chosen(study, arguments)
        only_tables = arguments.no_train
        not_run = not_begun(tasks) if only_tables else train(study, tasks, arguments.at_once)
        unscored = score_together(study, tasks, arguments.at_once)
        if arguments.task is None:
            write(study, not_run, out, arguments.allow_confounded, argv, runs)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(short(f"error: {error}"))
    except KeyboardInterrupt as stopped:
        print("stopped: start the same command again to go on", file=sys.stderr)
        sys.exit(128 + (stopped.args[0] if stopped.args else signal.SIGINT))
    exit_unless_complete(tasks, not_run, unscored, alone=arguments.task is not None)


def parsed(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the options, and the words that are recipe fields."""
    parser = Options(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("study", type=Path)
    add("--recipe", help="another recipe than the study's")
    add("--launch", help="another launch config than the study's, by name or path")
    add("--processes", type=int, help="processes of every cell that names none itself")
    add("--known_text", metavar="FILE", help="score this text that the base model knew, too")
    add("--random", metavar="SHAPE", help="random weights of this shape, and random rows")
    add("--runs", type=Path, help="where the runs are kept (default: runs/study-NAME)")
    add("--out", type=Path, help="where tables and plots go (default: beside the runs)")
    add("--dry-run", action="store_true", help="print the commands")
    add("--at_once", type=int, default=1, help="trainings that start together, timed in turn")
    add("--task", type=int, help="train this one alone")
    add("--no_train", action="store_true", help="write the tables of what is there")
    add("--power", action="store_true", help="train nothing; how many seeds would it take?")
    add("--difference", type=float, help="with --power: of a score, to be found")
    add("--deviation", type=float, help="with --power: of a difference between seeds")
    add(
        "--allow-confounded",
        action="store_true",
        help="show cells that differ in more than the axis, marked so",
    )
    return parser.parse_known_args(argv)


def recipe_fields(words: list[str]) -> dict[str, Any]:
    """Returns `--field value ...` words as fields; several values are a list."""
    if words and not field_name(words[0]):
        raise ValueError(f"{words[0]}: expected --field value")
    return {
        name: values[0] if len(values) == 1 else values or "true"
        for name, values in field_words(words).items()
    }


def commands(study: Study) -> Iterator[str]:
    """Returns the commands of a study, as far as they are known before it is tuned."""
    for task in study.tuning or study.tasks:
        yield shlex.join(task.command())
    if study.tuning:
        then = counted(len(study.tasks), "training")
        yield f"# then {then}, each cell at its own best {study.tuned}"


def power_lines(study: Study, arguments: argparse.Namespace) -> Iterator[str]:
    """Returns which differences a number of seeds shows, and how many a difference takes.

    The spread is that of the finished runs, unless the command line states one.
    """
    spread, rows = {"a score": arguments.deviation}, []
    for name in ("deviation", "difference"):
        if (value := getattr(arguments, name)) is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name} {value}: expected a number above 0")
    if arguments.deviation is None:
        study = at_best(study) if study.tuning else study
        rows, _ = collect(study, not_begun(study.tasks), arguments.allow_confounded)
        spread = deviations(claims(study, rows))
    if not spread:
        raise ValueError(
            "no two cells have scores of three seeds, so the spread is not known: pass "
            "--deviation, the standard deviation of a difference between seeds"
        )
    cells = max(len(study.cells) - 1, 1)
    yield f"{counted(cells, 'comparison')} with {study.reference}. Found in 80 % of studies:"
    yield aligned(power_table(spread, cells, title_of))
    scored = (read_results(task.folder).quality for task in study.tasks if task.has_run())
    tested = next((one["rows"] for one in scored if one), None) if rows else None
    for score, deviation in spread.items() if arguments.difference else ():
        seeds = seeds_needed(arguments.difference, deviation, cells)
        takes = "over 1,000 seeds" if seeds is None else f"{seeds} seeds"
        said = f"{title_of(score)}: a difference of {arguments.difference:g} takes {takes}"
        widths = [row[f"{score} high"] - row[f"{score} low"] for row in rows if row.get(score)]
        if widths and tested:
            asked = rows_needed(arguments.difference, tested, statistics.median(widths) / 2)
            said += f", and between two single runs at most {asked:,} test rows (here {tested:,})"
        yield said


def tune(study: Study, arguments: argparse.Namespace) -> Study:
    """Train what chooses each cell's value of the tuned field; returns the study at these values.

    A single task may be one of those that choose: then the study stays as it is.
    """
    only = arguments.task
    if not study.tuning or (only is not None and only < len(study.tuning)):
        return study
    if only is None and not arguments.no_train:
        train(study, study.tuning, arguments.at_once)
    return at_best(study)


def chosen(study: Study, arguments: argparse.Namespace) -> list[Task]:
    """Returns the tasks that the command line asks for: all, or the one of `--task`."""
    if arguments.task is None:
        return study.tasks
    return [[*study.tuning, *study.tasks][arguments.task]]


def train(study: Study, tasks: list[Task], at_once: int = 1) -> dict[str, str]:
    """Train what is not done and has the GPUs it needs; a random model and its rows come first.

    `at_once` trainings start together. They are timed in turn, if the study compares speed.
    Returns why tasks were not run, by name.
    """
    places = {
        task.name: f"[{number}/{len(tasks)}] {task.name}"
        for number, task in enumerate(tasks, start=1)
    }
    todo, not_run = runnable(tasks, places)
    if todo and study.random:
        from sftlab.models.random_models import make_random_files  # imports transformers

        make_random_files(*study.random)
    began = said_at = time.monotonic()
    ended = 0
    while todo:
        group, todo = todo[:at_once], todo[at_once:]
        for place in train_together(group, study.speed):
            took, said_at, ended = time.monotonic() - said_at, time.monotonic(), ended + 1
            left = (said_at - began) / ended * (len(group) - place - 1 + len(todo))
            said = f"{places[group[place].name]}: {result(group[place])}"
            print(f"{said}; {took:.0f} s, about {left / 60:.0f} min left", flush=True)
        again = [task for task in group if len(group) > 1 and ran_out_of_memory(task)]
        if again:
            names = ", ".join(task.name for task in again)
            print(f"out of memory beside others, so each alone again: {names}", flush=True)
            not_run |= train(study, again)
    return not_run


def runnable(tasks: Sequence[Task], places: dict[str, str]) -> tuple[list[Task], dict[str, str]]:
    """Returns the tasks to train, and why others cannot be; prints what is skipped."""
    import torch

    gpus, todo, not_run = torch.cuda.device_count(), [], {}
    for task in tasks:
        if is_done(task):
            print(f"{places[task.name]}: {result(task)}; done before", flush=True)
        elif gpus_needed(task) > gpus:
            not_run[task.name] = f"it needs {counted(gpus_needed(task), 'GPU')}"
            said = f"not run, {not_run[task.name]}, this machine shows {gpus}"
            print(f"{places[task.name]}: {said}", flush=True)
        else:
            todo.append(task)
    return todo, not_run


def train_together(group: Sequence[Task], timed: bool) -> Iterator[int]:
    """Start a group of trainings, time them in turn or not; give the place of each as it ends."""
    for task in group:
        begin(task, beside=len(group) - 1)
    commands = [Command(python_command(task), task.folder / "log") for task in group]
    yield from in_turn(commands, timed, cwd=ROOT)


def score_together(study: Study, tasks: Sequence[Task], at_once: int) -> list[Task]:
    """Evaluate runs, `at_once` beside one another; returns those whose evaluation failed."""
    if not study.quality:
        return []
    with ThreadPoolExecutor(at_once) as pool:
        done = pool.map(lambda task: score(study, task, at_once), tasks)
        return [task for task, went_well in zip(tasks, done, strict=True) if not went_well]


def score(study: Study, task: Task, at_once: int) -> bool:
    """Evaluate a run that has an adapter and lacks scores; returns whether none is missing then."""
    if not (task.folder / "adapter").is_dir():
        return True
    for script, *options in lacking(study, read_results(task.folder)):
        # one write, as others beside it print too
        said = " ".join([f"eval/{script} on base and tuned", *options])
        sys.stdout.write(f"{task.name}: {said}\n")
        sys.stdout.flush()
        command = [sys.executable, f"eval/{script}", "--run", str(task.folder), *options]
        with (task.folder / "log").open("a", encoding="utf-8") as log:
            given = {"cwd": ROOT, "env": environment_beside(at_once, timed=False)}
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, **given)
        if stopped := STOPPED.get(done.returncode):
            raise KeyboardInterrupt(stopped)
        if done.returncode:
            return False
    return True


def lacking(study: Study, found: RunResults) -> list[list[str]]:
    """Returns the evaluations that a run lacks: a script of eval/ and its options."""
    wanted = []
    if not found.quality:
        given = study.quality_options.items()
        wanted.append(["quality.py", *(f"--{name}={value}" for name, value in given)])
    scored = {perplexity_of(one["held_out"]["dataset"]) for one in found.texts}
    if study.known_text and perplexity_of(study.known_text) not in scored:
        wanted.append(["quality.py", "--dataset_name", study.known_text])
    given = dict(study.harness)
    tasks, files = given.pop("tasks", []), given.pop("files", [])
    answered = {one["task"] for one in found.tasks if one["limit"] == given.get("limit")}
    if left := [task for task in tasks if task not in answered]:
        options = [f"--{name}={value}" for name, value in given.items()]
        options += ["--files", *files] if files else []
        wanted.append(["harness.py", "--tasks", ",".join(left), *options])
    return wanted


def exit_unless_complete(
    tasks: list[Task], not_run: dict[str, str], unscored: list[Task], alone: bool
) -> None:
    """End with an error where a task has no result or no scores."""
    if alone and not is_done(tasks[0]):
        sys.exit(f"error: {tasks[0].name}: {not_run.get(tasks[0].name) or result(tasks[0])}")
    if unscored:
        logs = ", ".join(str(task.folder / "log") for task in unscored)
        sys.exit(f"error: an evaluation failed, see {logs}")
    if failed := failures(tasks, not_run):
        sys.exit(f"error: no result of {len(failed)} of {len(tasks)}: {'; '.join(failed)}")


def write(
    study: Study,
    not_run: dict[str, str],
    out: Path,
    allow_confounded: bool,
    argv: list[str],
    runs: Path,
) -> None:
    """Write tables and plots of the runs in `runs`, and print the tables.

    Raises ValueError where tables with results would be replaced by tables without any.
    """
    rows, unexplained = collect(study, not_run, allow_confounded)
    check_not_emptied(out, rows)
    summary, found = summarise(study, rows), claims(study, rows)
    changed = effects(study, summary)
    claim_output_folder(out, "study.md", f"{RUNS_LINE}{runs}\n")
    write_csv(out / "runs.csv", rows)
    write_csv(out / "summary.csv", summary)
    plots = draw_study(study, summary, out)
    lines = heading(study, unexplained, argv, runs)
    unreached = unreached_line(study)
    lines += [unreached, ""] if unreached else []
    lines += result_lines(study, summary, changed, found)
    tried = trials(study) if study.tuning else []
    if tried:
        write_csv(out / "tuning.csv", tuning_rows(tried, study.tuned))
        plots += draw_tuning(study, tried, out)
        lines += tuning_lines(study, tried)
    lines += [line for plot in plots for line in (f"![{plot}]({plot}.svg)", "")]
    (out / "study.md").write_text("\n".join(lines), encoding="utf-8")
    brief = [{k: v for k, v in line.items() if k not in LONG} for line in summary]
    tables = [summary_table(brief)]
    tables += [claims_table(found)] if found else []
    tables += [effects_table(changed)] if changed else []
    tables += [tuning_table(tried, study.tuned)] if tried else []
    print("", *map(aligned, tables), sep="\n")
    for line in [*finding_lines(found, title_of), least_found_line(found, title_of)]:
        print(f"\n{line}" if line else "")
    if unreached:
        print(f"\n{unreached}")
    written = ["study.md", "runs.csv", "summary.csv", *(["tuning.csv"] if tried else [])]
    written += [f"{plot}.png/.svg" for plot in plots]
    print(f"\nwritten to {out}: {', '.join(written)}")


if __name__ == "__main__":
    with mistakes_in_one_line():
        main(sys.argv[1:])
