"""Have a judge rate base's and tuned's answers to MT-Bench's 80 questions of two turns.

python eval/mt_bench.py --run runs/x --judge prometheus-eval/prometheus-7b-v2.0 [--limit 40]
    --questions question.jsonl --references reference_answer/gpt-4.jsonl
    [--judge_in_4bit | --judge_url http://localhost:8000/v1]
python eval/mt_bench.py --config_file accelerate_configs/ddp.yaml --num_processes 4 --run runs/x ...

Answers are sampled at the published temperature of each category; the judge is greedy. It rates
from 1 to 10, Prometheus from 1 to 5. RUN/eval/mt_bench.json keeps the newest entry of each judge.
Beside it are a radar plot, a bar plot, and mt_bench-judgements-*.jsonl with every prompt, answer,
judgement and rating. Answers and judgements are kept as they come: after a kill the same command
goes on, and a finished evaluation is scored again without a GPU. Batches of answers and of
judgements are dealt over several processes, and the results are those of one.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.launcher  # it may replace this process
import sftlab.startup.preload  # noqa: F401

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sftlab.evaluation.answer_file import answer_facts, digest
from sftlab.evaluation.base_and_tuned import evaluation_errors, finished_run
from sftlab.evaluation.generation import Answer, Sampling
from sftlab.evaluation.processes import Processes
from sftlab.evaluation.significance import FEW_ROWS, method
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.judging.judge_options import add_evaluation_flags, contestants_of, judge_from
from sftlab.judging.judgement_files import (
    entry_facts,
    judgement_hashes,
    keep_entry,
    report_head,
    title_hash,
    unfit_mark,
    unfit_warning,
    verdict_file,
    write_records,
)
from sftlab.judging.model_answers import refuse_twins
from sftlab.judging.ratings import (
    Answered,
    Question,
    Rated,
    contradictions,
    ends,
    mean_ratings,
    noise_floor,
    rate_answers,
    read_questions,
    right_over_shuffled,
    unparsed,
)
from sftlab.judging.sanity_checks import UNPARSED_REFUSED, UNPARSED_SAID, spread
from sftlab.judging.two_turns import both_turns, draw_twice
from sftlab.judging.unparsed import asked_again, cut_warning, unparsed_lines
from sftlab.runs.run_directory import SIDES
from sftlab.script_options import Options
from sftlab.startup.launcher import reported_to_launcher
from sftlab.tables import aligned, interval, p_value, percent

COLOURS = {"base": "0.6", "tuned": "tab:blue"}
STATISTICS = (
    f"{method('questions')}; p of turns and of categories after Holm over those, p overall is one "
    "claim"
)


def main(argv: list[str]) -> None:
    """Answer both turns, check the judge, let it rate, write, plot, print."""
    arguments = parse_arguments(argv)
    with evaluation_errors(
        ": take a smaller --batch_size or --judge_batch_size; what is done is kept"
    ):
        evaluate(arguments, Processes.joined())


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Options(description=__doc__.splitlines()[0])
    add_evaluation_flags(
        parser,
        30,
        "this many questions, spread over the categories (default: all)",
        "longest answer to a turn in tokens",
    )
    data = Path("data/mt_bench")
    parser.add_argument(
        "--questions", type=Path, default=data / "question.jsonl", help="MT-Bench's questions"
    )
    parser.add_argument(
        "--references",
        type=Path,
        default=data / "reference_answer_gpt-4.jsonl",
        help="GPT-4's answers",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the categories with a temperature above 0"
    )
    return parser.parse_args(argv)


def evaluate(arguments: argparse.Namespace, processes: Processes) -> None:
    """Run the whole evaluation. Raises ValueError where it cannot be done."""
    small = arguments.limit < 0 or arguments.batch_size < 1 or arguments.sanity_checks < 1
    if small or not arguments.judge:
        raise ValueError(
            "expected --judge, --limit of 0 (all) or more, and --batch_size and --sanity_checks of "
            "at least 1"
        )
    sampling = Sampling(arguments.max_new_tokens, seed=arguments.seed)
    run = finished_run(arguments.run)
    every = read_questions(arguments.questions, arguments.references)
    questions = spread(every, arguments.limit or len(every))
    judge, style = judge_from(arguments)
    contestants = contestants_of(arguments, run, processes)
    turns = {side: both_turns(contestants, side, questions, sampling) for side in SIDES}
    about = {
        side: answer_facts([answer for one in turns[side] for answer in one]) for side in SIDES
    }
    refuse_twins(about)
    sampled = [one for one in questions if one.temperature > 0][: arguments.sanity_checks]
    again = draw_twice(contestants, sampled, sampling)
    contestants.free()

    facts = judge.facts | {"format": style.name}
    file, size = verdict_file(arguments.run / "eval", facts, processes), arguments.judge_batch_size
    rated = partial(rate_answers, judge, style, file=file, size=size)
    referenced = [one for one in every if one.references][: arguments.sanity_checks]
    checks, tried = check_judge(rated, referenced, again, style.scale)
    records = {side: rate_both(rated, questions, turns[side], f"judging {side}") for side in SIDES}
    if not processes.is_main:
        return
    every_record = [*tried, *records["base"], *records["tuned"]]
    checks += [unparsed(every_record), contradictions(every_record)]
    report = facts_of(arguments, questions, facts, style.scale, checks, records)
    report |= {"answers": about, "prompts_cut": contestants.prompts_cut}
    most = max(one["unparsed"]["value"] for one in report["judged"].values())
    refused = most > UNPARSED_REFUSED and not arguments.allow_unparsed
    report["scores"] = {} if refused else mean_ratings(records, style.scale)
    report["warnings"] = warnings(report, records)
    report["files"] = write(arguments.run / "eval", report, records, tried)
    print_report(report)
    if refused:
        sys.exit(
            f"error: more than {percent(UNPARSED_REFUSED)} of the judgements hold no rating: no "
            "mean is given without --allow-unparsed; the files named above hold every judgement"
            f"{asked_again(facts, report['judged'])}"
        )


def facts_of(
    arguments: argparse.Namespace,
    questions: Sequence[Question],
    judge: dict[str, Any],
    scale: tuple[int, int],
    checks: list[dict[str, Any]],
    records: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    """Returns who rated what and how, and the sanity checks."""
    hashes = judgement_hashes(records, "answers", "judgement")
    limited = f", {len(questions)} questions" if arguments.limit else ""
    name = Path(arguments.judge).name
    title = f"MT-Bench{limited}, judge {name}, scale {scale[0]} to {scale[1]}"
    return entry_facts(arguments.run, title, len(questions), judge, checks) | {
        "questions_hash": digest(questions),
        "scale": scale,
        "judged": {
            side: {"hash": hashes[side], "unparsed": unparsed(records[side])} | ends(records[side])
            for side in SIDES
        },
        "generation": {
            "max_new_tokens": arguments.max_new_tokens,
            "seed": arguments.seed,
            "temperature": "by category",
        },
        "statistics": STATISTICS,
    }


def check_judge(
    rated: Rated, right: Sequence[Question], again: list[list[Answered]], scale: tuple[int, int]
) -> tuple[list, list]:
    """Run the sanity checks. Returns a row of each, and the records behind them."""
    row, records = right_over_shuffled(rated, right)
    checks = [row]
    if again[0]:
        drawn = [rated(one, "base against base") for one in again]
        checks.append(noise_floor(*drawn, scale))
        records += [*drawn[0], *drawn[1]]
    return checks, records


def rate_both(
    rated: Rated, questions: Sequence[Question], answers: Sequence[Sequence[Answer]], title: str
) -> list[dict[str, Any]]:
    """Returns the judge's records of both turns."""
    texts = [[answer.text for answer in one] for one in answers]
    asked = [
        Answered(one, text[:turn])
        for turn in (1, 2)
        for one, text in zip(questions, texts, strict=True)
    ]
    return rated(asked, title)


def warnings(report: dict[str, Any], records: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Returns what a reader must know before believing the table."""
    found = unfit_warning(report)
    for side in SIDES:
        judged, most = report["judged"][side], report["judge"].get("max_new_tokens")
        found += cut_warning(judged["cut"]["value"], side, most)
        share = judged["unparsed"]["value"]
        if share > UNPARSED_SAID:
            found.append(
                f"{percent(share)} of the judgements of {side} hold no rating and are left out"
            )
        empty = sum(not record["answers"][-1].strip() for record in records[side])
        if empty:
            found.append(f"{empty} answers of {side} are empty; they are rated as they are")
        cut = sum(record["characters_cut"] > 0 for record in records[side])
        if cut:
            found.append(
                f"{cut} answers of {side} were too long for the judge and were cut in the middle"
            )
    questions = Counter(one["category"] for one in records["base"] if one["turn"] == 1)
    if questions.total() < FEW_ROWS:
        found.append(f"fewer than {FEW_ROWS} questions: the intervals are wide")
    elif (fewest := min(questions.values())) < FEW_ROWS:
        found.append(
            f"categories have as few as {fewest} questions: their intervals are wide, and rare "
            "failures may be missing from them"
        )
    if report["prompts_cut"]:
        found.append(
            f"{report['prompts_cut']} prompts were too long for the model and were cut in the "
            "middle"
        )
    return found


def write(folder: Path, report: dict[str, Any], records: dict[str, list], tried: list) -> list[str]:
    """Write the entry in mt_bench.json, the records and the plots. Returns the files' names."""
    rows = [{"side": side, **record} for side, one in records.items() for record in one]
    names = write_records(folder, "mt_bench", report["title"], judgements=rows, sanity_checks=tried)
    if report["scores"]:
        for name, paint in (("radar", radar), ("bars", bars)):
            canvas = Figure(figsize=(8, 6), layout="constrained")
            paint(canvas, report)
            mark = "" if report["judge_fit"] else "UNFIT JUDGE: these ratings mean nothing\n"
            canvas.suptitle(f"{mark}{report['title']}", fontsize=10)
            for suffix in ("png", "svg"):
                names.append(f"mt_bench-{name}-{title_hash(report['title'])}.{suffix}")
                canvas.savefig(folder / names[-1])
    keep_entry(folder / "mt_bench.json", report | {"files": names})
    return names


def categories(report: dict[str, Any]) -> list[str]:
    """Returns the scores that are categories."""
    return [name for name in report["scores"] if name != "overall" and not name.startswith("turn ")]


def radar(canvas: Figure, report: dict[str, Any]) -> None:
    """Draw both models by category, over the judge's whole scale."""
    names = categories(report)
    angles = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    axes = canvas.add_subplot(projection="polar")
    for side in SIDES:
        values = [report["scores"][name][side]["value"] for name in names]
        closed = [*values, values[0]]
        axes.plot([*angles, angles[0]], closed, color=COLOURS[side], label=side)
        axes.fill([*angles, angles[0]], closed, color=COLOURS[side], alpha=0.15)
    axes.set_xticks(angles, names)
    axes.set_ylim(report["scale"][0], report["scale"][1])
    axes.tick_params(axis="x", pad=12)
    axes.legend(loc="lower right", bbox_to_anchor=(1.25, -0.05), frameon=False)


def bars(canvas: Figure, report: dict[str, Any]) -> None:
    """Draw both models overall, by turn and by category, with 95 % intervals."""
    axes, names = canvas.subplots(), list(report["scores"])
    for side, shift in (("base", -0.2), ("tuned", 0.2)):
        found = [report["scores"][name][side] for name in names]
        values = np.array([one["value"] for one in found])
        ends = np.abs(np.array([one["interval_95"] for one in found]).T - values)
        places = np.arange(len(names)) + shift
        axes.barh(
            places,
            values,
            0.38,
            xerr=ends,
            color=COLOURS[side],
            ecolor="0.3",
            capsize=2,
            label=side,
        )
    axes.set_yticks(range(len(names)), names)
    axes.set(
        xlim=report["scale"], xlabel="mean rating, 95 % intervals", ylim=(len(names) - 0.5, -0.5)
    )
    axes.legend(frameon=False, loc="lower right")


def print_report(report: dict[str, Any]) -> None:
    """Print warnings, sanity checks and means."""
    print(report_head(report, "questions of two turns"))
    lines = [[f"mean rating{unfit_mark(report)}", "base", "tuned", "tuned - base", "p"]]
    for name, one in report["scores"].items():
        cells = [interval(one[key]) for key in ("base", "tuned", "difference")]
        lines.append([name, *cells, p_value(one["p_holm"])])
    print(aligned(lines))
    print(f"  in brackets 95 % intervals; {report['statistics']}")
    for side in SIDES:
        for line in unparsed_lines(report["judged"][side]["unparsed_kinds"]):
            print(f"  {side}, {line}")
    print(f"  written: {', '.join(report['files'])}")


if __name__ == "__main__":
    with reported_to_launcher(), mistakes_in_one_line():
        main(sys.argv[1:])
