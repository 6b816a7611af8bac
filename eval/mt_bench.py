"""MT-Bench: base and tuned answer 80 questions of two turns, a judge rates each answer on the scale
it was made for.

python eval/mt_bench.py --run runs/x --judge prometheus-eval/prometheus-7b-v2.0 --questions question.jsonl
    --references reference_answer/gpt-4.jsonl [--judge_in_4bit | --judge_url http://localhost:8000/v1] [--limit 40]

The run's template and the real history of each conversation; temperatures by category as published;
the judge greedy, on 1 to 10, or Prometheus on 1 to 5. Writes RUN/eval/mt_bench.json (the newest
entry of each judge), a radar and a bar plot, and every prompt, answer, judgement and rating in
mt_bench-judgements-*.jsonl. Answers and judgements are kept as they come: the same command goes on
after a kill, and scores again without a GPU.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.preload  # noqa: F401

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sftlab.judging.sanity_checks import UNPARSED_REFUSED, UNPARSED_SAID, spread
from sftlab.judging.model_answers import Contestants, refuse_twins
from sftlab.evaluation.answer_file import AnswerFile, answer_facts, digest
from sftlab.evaluation.generation import Answer, Sampling
from sftlab.judging.judges import add_judge_flags, judge_from
from sftlab.judging.judgement_files import (
    canary_table,
    judgement_hashes,
    keep_entry,
    title_hash,
    write_records,
)
from sftlab.evaluation.base_and_tuned import finished_run, one_sentence
from sftlab.judging.ratings import (
    Answered,
    Question,
    Rated,
    mean_ratings,
    noise_floor,
    rate_answers,
    read_questions,
    right_over_shuffled,
    unparsed,
)
from sftlab.runs.environment import environment
from sftlab.runs.run_directory import SIDES, adapter_hash
from sftlab.evaluation.significance import FEW_ROWS, RESAMPLES
from sftlab.tables import aligned, interval, p_value, percent

COLOURS = {"base": "0.6", "tuned": "tab:blue"}

STATISTICS = (
    f"paired bootstrap over questions, {RESAMPLES} resamples (p of fewer than {FEW_ROWS}: by "
    "exchanging the models' "
    "answers); p after Holm over all rows"
)


def main(argv: list[str]) -> None:
    """Answer both turns, try the judge, let it rate, write, plot, print."""
    arguments = parse_arguments(argv)
    with one_sentence(": take a smaller --batch_size or --judge_batch_size; what is done is kept"):
        evaluate(arguments)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path, help="a finished run's directory")
    add_judge_flags(parser)
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
        "--limit", type=int, default=0, help="this many questions, of all categories (default: all)"
    )
    parser.add_argument("--canaries", type=int, default=30, help="questions of each canary")
    parser.add_argument("--batch_size", type=int, default=32, help="answers at once")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="longest answer to a turn")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the categories whose answers are drawn"
    )
    parser.add_argument(
        "--allow-unparsed", action="store_true", help="give means whatever share is unparsed"
    )
    return parser.parse_args(argv)


def evaluate(arguments: argparse.Namespace) -> None:
    """The whole evaluation; ValueError says in one sentence why it cannot be done."""
    if (
        arguments.limit < 0
        or arguments.batch_size < 1
        or arguments.canaries < 1
        or not arguments.judge
    ):
        raise ValueError(
            "expected --judge, --limit of 0 (all) or more, and --batch_size and --canaries of at "
            "least 1"
        )
    sampling = Sampling(arguments.max_new_tokens, seed=arguments.seed)
    run = finished_run(arguments.run)
    every = read_questions(arguments.questions, arguments.references)
    questions = spread(every, arguments.limit or len(every))
    judge, style = judge_from(arguments)
    facts = judge.facts | {"format": style.name}
    contestants = Contestants(arguments.run, run, arguments.batch_size)
    turns = {side: both_turns(contestants, side, questions, sampling) for side in SIDES}
    about = {
        side: answer_facts([answer for one in turns[side] for answer in one]) for side in SIDES
    }
    refuse_twins(about)
    again = draw_again(
        contestants,
        [one for one in questions if one.temperature > 0][: arguments.canaries],
        sampling,
    )
    contestants.free()

    file = AnswerFile(
        arguments.run / "eval", {k: v for k, v in facts.items() if k != "server"}, kind="verdicts"
    )
    rated = partial(rate_answers, judge, style, file=file, size=arguments.judge_batch_size)
    canaries, tried = try_judge(
        rated, [one for one in every if one.references][: arguments.canaries], again
    )
    records = {side: rate_both(rated, questions, turns[side], f"judging {side}") for side in SIDES}
    canaries.append(unparsed([*tried, *records["base"], *records["tuned"]]))
    report = facts_of(arguments, questions, facts, style.scale, canaries, records)
    report |= {"answers": about, "prompts_cut": contestants.prompts_cut}
    most = max(one["unparsed"]["value"] for one in report["judged"].values())
    refused = most > UNPARSED_REFUSED and not arguments.allow_unparsed
    report["scores"] = {} if refused else mean_ratings(records)
    report["warnings"] = warnings(report, records)
    report["files"] = write(arguments.run / "eval", report, records, tried)
    print_report(report)
    if refused:
        sys.exit(
            f"error: more than {percent(UNPARSED_REFUSED)} of the judgements hold no rating: no "
            "mean is given without "
            "--allow-unparsed; every judgement is in the files named above"
        )


def facts_of(
    arguments: argparse.Namespace,
    questions: Sequence[Question],
    judge: dict[str, Any],
    scale: tuple[int, int],
    canaries: list[dict[str, Any]],
    records: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    """Who rated what and how, and whether that judge can be believed."""
    hashes = judgement_hashes(records, "answers", "judgement")
    limited = f", {len(questions)} questions" if arguments.limit else ""
    return {
        "title": f"MT-Bench{limited}, judge {Path(arguments.judge).name}, scale {scale[0]} to {scale[1]}",
        "run": str(arguments.run),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "adapter_hash": adapter_hash(arguments.run),
        "rows": len(questions),
        "questions_hash": digest(questions),
        "scale": scale,
        "judge": judge,
        "judge_fit": all(row["passed"] for row in canaries),
        "canaries": canaries,
        "judged": {
            side: {"hash": hashes[side], "unparsed": unparsed(records[side])} for side in SIDES
        },
        "generation": {
            "max_new_tokens": arguments.max_new_tokens,
            "seed": arguments.seed,
            "temperature": "by category",
        },
        "statistics": STATISTICS,
        **environment(),
    }


def both_turns(
    contestants: Contestants, side: str, questions: Sequence[Question], sampling: Sampling
) -> list[list[Answer]]:
    """The answers of one side to both turns, each question at its temperature.

    The second sees the first.
    """
    found: list[list[Answer]] = [[] for _ in questions]
    for turn in (0, 1):
        for temperature in sorted({one.temperature for one in questions}):
            chosen = [i for i, one in enumerate(questions) if one.temperature == temperature]
            asked = [conversation(questions[i], found[i], turn) for i in chosen]
            title = f"{side}, turn {turn + 1}, temperature {temperature}"
            drawn = Sampling(sampling.max_new_tokens, temperature, seed=sampling.seed)
            for i, answer in zip(
                chosen, contestants.answers(side, asked, drawn, title), strict=True
            ):
                found[i].append(answer)
    return found


def conversation(question: Question, answers: Sequence[Answer], turn: int) -> list[dict[str, str]]:
    """The messages up to the question of a turn (0 or 1)."""
    messages = []
    for i in range(turn):
        messages += [
            {"role": "user", "content": question.turns[i]},
            {"role": "assistant", "content": answers[i].text},
        ]
    return [*messages, {"role": "user", "content": question.turns[turn]}]


def draw_again(
    contestants: Contestants, questions: Sequence[Question], sampling: Sampling
) -> list[list[Answered]]:
    """Two answers of the base model to the first turn of questions that are answered at a
    temperature above 0.
    """
    found: list[list[Answered]] = [[], []]
    for temperature in sorted({one.temperature for one in questions}):
        chosen = [one for one in questions if one.temperature == temperature]
        drawn = Sampling(sampling.max_new_tokens, temperature, seed=sampling.seed)
        asked = [conversation(one, [], 0) for one in chosen]
        for place, answers in enumerate(contestants.draws(asked, drawn, "base answers drawn")):
            found[place] += [
                Answered(one, [answer.text]) for one, answer in zip(chosen, answers, strict=True)
            ]
    return found


def try_judge(
    rated: Rated, right: Sequence[Question], again: list[list[Answered]]
) -> tuple[list, list]:
    """The canaries, and their records."""
    row, records = right_over_shuffled(rated, right)
    canaries = [row]
    if again[0]:
        drawn = [rated(one, "base against base") for one in again]
        canaries.append(noise_floor(*drawn))
        records += [*drawn[0], *drawn[1]]
    return canaries, records


def rate_both(
    rated: Rated, questions: Sequence[Question], answers: Sequence[Sequence[Answer]], title: str
) -> list[dict[str, Any]]:
    """The judge's records of both turns."""
    texts = [[answer.text for answer in one] for one in answers]
    asked = [
        Answered(one, text[:turn])
        for turn in (1, 2)
        for one, text in zip(questions, texts, strict=True)
    ]
    return rated(asked, title)


def warnings(report: dict[str, Any], records: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What a reader must know before believing the table."""
    found = []
    if not report["judge_fit"]:
        failed = [row["canary"] for row in report["canaries"] if not row["passed"]]
        found.append(
            f"the judge is UNFIT, it failed: {', '.join(failed)}; what it says of the models means "
            "nothing"
        )
    for side in SIDES:
        share = report["judged"][side]["unparsed"]["value"]
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
                f"{cut} answers of {side} were too long for the judge: cut from the middle"
            )
    if len(records["base"]) // 2 < FEW_ROWS:
        found.append(f"fewer than {FEW_ROWS} questions: the intervals are rough")
    if report["prompts_cut"]:
        found.append(
            f"{report['prompts_cut']} prompts were too long for the model: cut from the middle"
        )
    return found


def write(folder: Path, report: dict[str, Any], records: dict[str, list], tried: list) -> list[str]:
    """The entry in mt_bench.json, the records and the plots; returns the files' names."""
    rows = [{"side": side, **record} for side, one in records.items() for record in one]
    names = write_records(folder, "mt_bench", report["title"], judgements=rows, canaries=tried)
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
    """The scores that are categories."""
    return [name for name in report["scores"] if name != "overall" and not name.startswith("turn ")]


def radar(canvas: Figure, report: dict[str, Any]) -> None:
    """Both models by category on the whole of the judge's scale."""
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
    """Both models overall, by turn and by category, with 95 % intervals."""
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
    """Warnings, the canaries, the means."""
    print(
        f"\n{report['title']}: base against tuned of {report['run']} on {report['rows']} questions "
        "of two turns"
    )
    for warning in report["warnings"]:
        print(f"  warning: {warning}")
    print(
        f"\n{canary_table(report['canaries'])}\n  the judge is "
        f"{'fit' if report['judge_fit'] else 'UNFIT'}\n"
    )
    mark = "" if report["judge_fit"] else " (UNFIT judge)"
    lines = [[f"mean rating{mark}", "base", "tuned", "tuned - base", "p"]]
    for name, one in report["scores"].items():
        lines.append(
            [
                name,
                *(interval(one[key]) for key in ("base", "tuned", "difference")),
                p_value(one["p_holm"]),
            ]
        )
    print(aligned(lines))
    print(f"  in brackets 95 % intervals; {report['statistics']}")
    print(f"  written: {', '.join(report['files'])}")


if __name__ == "__main__":
    main(sys.argv[1:])
