"""Have a judge compare base's and tuned's answers to AlpacaEval's instructions with a reference.

python eval/alpaca.py --run runs/x --judge prometheus-eval/prometheus-7b-v2.0 [--limit 100]
    [--reference base|FILE|NAME] [--judge_in_4bit | --judge_url http://localhost:8000/v1]
    [--agreement annotations.json]
python eval/alpaca.py --run runs/x-dpo --with_start --judge ...    # base, start and tuned
python eval/alpaca.py --run runs/x --annotators weighted_alpaca_eval_gpt4_turbo
python eval/alpaca.py --config_file accelerate_configs/ddp.yaml --num_processes 4 --run runs/x ...
python eval/alpaca.py --outputs model_outputs.json --annotations annotations.json

With --with_start the model that the run went on from is judged too: for preference tuning, that
after supervised fine-tuning. Each pair is judged in both orders. Sanity checks come first:
pairs whose right verdict is known. RUN/eval/alpaca.json keeps the newest entry of each judge and
reference. Beside it, alpaca-judgements-*.jsonl and alpaca-sanity_checks-*.jsonl hold every prompt,
answer, judgement and verdict. Answers and judgements are kept as they come: after a kill the same
command goes on, and a finished evaluation is scored again without a GPU. Several processes are
dealt whole batches of answers and of judgements, and the results are those of one. With --outputs
the leaderboard's figures of finished outputs are printed, and no run is needed.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.launcher  # it may replace this process
import sftlab.startup.preload  # noqa: F401

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sftlab.evaluation.answer_file import answer_facts, digest
from sftlab.evaluation.base_and_tuned import evaluation_errors, finished_run
from sftlab.evaluation.generation import Answer, Sampling
from sftlab.evaluation.processes import Processes
from sftlab.evaluation.significance import FEW_ROWS, method
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.judging.alpaca_annotators import Annotators
from sftlab.judging.alpaca_files import Task, read_preferences, read_task
from sftlab.judging.alpaca_report import (
    difference_table,
    rates,
    reference_name,
    table,
    title,
    unparsed_rate,
)
from sftlab.judging.finished_outputs import score_finished
from sftlab.judging.judge_options import add_evaluation_flags, contestants_of, judge_from
from sftlab.judging.judgement_files import (
    entry_facts,
    judgement_hashes,
    keep_entry,
    report_head,
    unfit_warning,
    verdict_file,
    write_records,
)
from sftlab.judging.length_control import mean_characters
from sftlab.judging.model_answers import refuse_twins
from sftlab.judging.pairwise import Pair, judge_pairs, tally
from sftlab.judging.sanity_checks import UNPARSED_REFUSED, UNPARSED_SAID, SanityChecks, spread
from sftlab.judging.unparsed import asked_again, cut_warning, unparsed_lines
from sftlab.script_options import Options
from sftlab.startup.launcher import reported_to_launcher
from sftlab.tables import aligned, figure, percent

Judged = Callable[..., list[dict[str, Any]]]
SHOWN_CONTRADICTIONS = 3
# At this temperature the base model answers twice. Two samples of one model are the noise floor.
NOISE_TEMPERATURE = 0.7


def main(argv: list[str]) -> None:
    """Answer, check the judge, let it compare, write, print."""
    arguments = parse_arguments(argv)
    if arguments.outputs or arguments.annotations:
        return score_outputs(arguments)
    with evaluation_errors(
        ": take a smaller --batch_size or --judge_batch_size; what is done is kept"
    ):
        evaluate(arguments, Processes.joined())


def score_outputs(arguments: argparse.Namespace) -> None:
    """Print the leaderboard's figures of outputs and annotations that are finished."""
    if not (arguments.outputs and arguments.annotations) or arguments.run or arguments.judge:
        raise ValueError(
            "expected --outputs and --annotations together, and neither --run nor --judge"
        )
    found = score_finished(arguments.outputs, arguments.annotations)
    title, *about = (found.pop(name) for name in ("title", "model", "judge", "reference"))
    print(f"{title}: {about[0]}, judge {about[1]}, reference {about[2]}")
    for warning in found.pop("warnings"):
        print(f"  warning: {warning}")
    note = found.pop("note", None)
    print(aligned([[key, figure(value)] for key, value in found.items()]))
    if note:
        print(f"  {note}")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Options(description=__doc__.splitlines()[0])
    add_evaluation_flags(
        parser,
        100,
        "the first n instructions (default: all)",
        "longest answer in tokens",
        needs_run=False,
    )
    parser.add_argument(
        "--outputs", type=Path, help="score finished outputs in AlpacaEval's form, without a run"
    )
    parser.add_argument("--annotations", type=Path, help="alpaca-eval's annotations of --outputs")
    parser.add_argument(
        "--annotators", help="judge by this config of alpaca-eval instead (most need an API key)"
    )
    parser.add_argument(
        "--reference",
        default="gpt4_1106_preview",
        help="base, a file of outputs, or a published name",
    )
    parser.add_argument(
        "--instructions", type=Path, help="a file of instructions (default: the reference's)"
    )
    parser.add_argument(
        "--agreement", type=Path, help="published annotations that the judge must agree with"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="of the answers; 0 (default) is greedy"
    )
    parser.add_argument(
        "--with_start", action="store_true", help="judge the model that the run went on from too"
    )
    return parser.parse_args(argv)


def evaluate(arguments: argparse.Namespace, processes: Processes) -> None:
    """Run the whole evaluation. Raises ValueError where it cannot be done."""
    if arguments.run is None:
        raise ValueError("expected --run with a finished run, or --outputs and --annotations")
    if arguments.limit < 0 or arguments.batch_size < 1 or arguments.sanity_checks < 1:
        raise ValueError(
            "--limit must be 0 (all) or more, --batch_size and --sanity_checks at least 1"
        )
    sampling = Sampling(arguments.max_new_tokens, arguments.temperature)
    run = finished_run(arguments.run)
    task = read_task(arguments.reference, arguments.instructions, arguments.limit)
    preferences = read_preferences(arguments.agreement) if arguments.agreement else None
    contestants = contestants_of(arguments, run, processes)
    if arguments.with_start:
        contestants.add_start()
    # alpaca-eval's annotators keep their own annotations: one process asks them
    judges = processes.is_main or not arguments.annotators
    chosen = choose_judge(arguments, processes) if judges else None
    sides = contestants.sides
    asked = [[{"role": "user", "content": text}] for text in task.questions.instructions]
    answers = {
        side: contestants.answers(side, asked, sampling, f"{side} answers") for side in sides
    }
    prompts_cut = contestants.prompts_cut // len(sides)
    about = {side: answer_facts(answers[side]) | mean_characters(answers[side]) for side in sides}
    refuse_twins(about)
    few = spread(range(len(asked)), arguments.sanity_checks)
    noise = Sampling(arguments.max_new_tokens, NOISE_TEMPERATURE)
    drawn = contestants.draws([asked[row] for row in few], noise, "base answers, sampled")
    contestants.free()
    if chosen is None:
        return

    judged, judge = chosen
    checks = check_judge(judged, task, few, drawn, preferences, arguments.sanity_checks)
    records = compare_with_reference(judged, task, answers)
    if not processes.is_main:
        return
    checks.behaviour([record for side in records.values() for record in side])
    report = facts_of(arguments, task, judge, checks, records)
    report |= {"answers": about, "instructions_cut": prompts_cut}
    refused = unparsed_rate(report) > UNPARSED_REFUSED and not arguments.allow_unparsed
    if not refused:
        report |= rates(task, arguments.annotators, arguments.limit, records, answers)
    report["warnings"] = warnings(arguments, report)
    report["files"] = write(arguments.run / "eval", report, records, checks)
    print_report(report, records)
    if refused:
        sys.exit(
            f"error: {percent(unparsed_rate(report))} of the judgements hold no verdict, more than "
            f"{percent(UNPARSED_REFUSED)}: no win rate is given without --allow-unparsed; the "
            f"files named above hold every judgement{asked_again(judge, report['judged'])}"
        )


def facts_of(
    arguments: argparse.Namespace,
    task: Task,
    judge: dict[str, Any],
    checks: SanityChecks,
    records: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    """Returns who judged what and how, the sanity checks, and a count of the verdicts."""
    questions, reference = task.questions.instructions, task.reference
    name = title(task, judge["judge"], arguments.annotators, arguments.limit)
    hashes = judgement_hashes(records, "answer", "judgements")
    return entry_facts(arguments.run, name, len(questions), judge, checks.rows) | {
        "questions_hash": digest([questions, reference.texts if reference else None]),
        "reference": reference_name(task),
        "judged": {side: tally(one) | {"hash": hashes[side]} for side, one in records.items()},
        "scores": {},
        "generation": {
            "temperature": arguments.temperature,
            "max_new_tokens": arguments.max_new_tokens,
        },
        "statistics": method("instructions"),
    }


def choose_judge(
    arguments: argparse.Namespace, processes: Processes
) -> tuple[Judged, dict[str, Any]]:
    """Returns the function that judges pairs, and the facts that name the judge."""
    folder = arguments.run / "eval"
    if bool(arguments.judge) == bool(arguments.annotators):
        raise ValueError("expected either --judge or --annotators, and one of them")
    if arguments.annotators:
        annotators = Annotators(arguments.annotators, folder)
        return annotators.judged, annotators.facts
    judge, style = judge_from(arguments)
    facts = judge.facts | {"format": style.name}
    file, size = verdict_file(folder, facts, processes), arguments.judge_batch_size
    return partial(judge_pairs, judge, style, file=file, size=size), facts


def check_judge(
    judged: Judged,
    task: Task,
    few: list[int],
    drawn: list[list[Answer]],
    preferences: tuple[list[Pair], list[bool], str] | None,
    count: int,
) -> SanityChecks:
    """Run the sanity checks: the judge on pairs whose right verdict is known."""
    checks = SanityChecks(lambda pairs, name: judged(pairs, title=name))
    instructions = task.questions.instructions
    known = [Pair(row, instructions[row], task.good[row], "") for row in few]
    checks.same_answer(known)
    checks.over_shuffled(known)
    again = zip(few, *drawn, strict=True)
    checks.noise_floor(
        [Pair(row, instructions[row], one.text, two.text) for row, one, two in again]
    )
    if preferences:
        pairs, preferred, whose = preferences
        chosen = spread(range(len(pairs)), count)
        checks.agreement([pairs[i] for i in chosen], [preferred[i] for i in chosen], whose)
    return checks


def compare_with_reference(
    judged: Judged, task: Task, answers: dict[str, list[Answer]]
) -> dict[str, list[dict[str, Any]]]:
    """Returns the judge's records of each side against the reference.

    Where base is the reference, it is not judged.
    """
    base = [answer.text for answer in answers["base"]]
    reference = task.reference.texts if task.reference else base
    found = {}
    for side in answers if task.reference else [one for one in answers if one != "base"]:
        rows = enumerate(zip(task.questions.instructions, answers[side], reference, strict=True))
        pairs = [
            Pair(row, instruction, answer.text, text) for row, (instruction, answer, text) in rows
        ]
        found[side] = judged(pairs, title=f"judging {side}")
    return found


def warnings(arguments: argparse.Namespace, report: dict[str, Any]) -> list[str]:
    """Returns what a reader must know before believing the table."""
    found = unfit_warning(report)
    if unparsed_rate(report) > UNPARSED_SAID:
        found.append(
            f"{percent(unparsed_rate(report))} of the judgements hold no verdict and are left out"
        )
    if not arguments.agreement:
        found.append(
            "the judge's agreement with GPT-4 was not checked: pass --agreement with published "
            "annotations"
        )
    if report["rows"] < FEW_ROWS:
        found.append(f"fewer than {FEW_ROWS} instructions: the intervals are wide")
    if cut := report["instructions_cut"]:
        found.append(f"{cut} instructions were too long for the model and were cut in the middle")
    for side, one in report["judged"].items():
        found += cut_warning(one["cut"]["value"], side, report["judge"].get("max_new_tokens"))
        if cut := one["pairs_cut"]:
            found.append(
                f"{cut} pairs of {side} were too long for the judge: answers were cut in the middle"
            )
    return found


def write(
    folder: Path, report: dict[str, Any], records: dict[str, list], checks: SanityChecks
) -> list[str]:
    """Write the entry in alpaca.json and the records beside it. Returns the files' names."""
    sides = [{"side": side, **record} for side, one in records.items() for record in one]
    names = write_records(
        folder, "alpaca", report["title"], judgements=sides, sanity_checks=checks.records
    )
    keep_entry(folder / "alpaca.json", report | {"files": names})
    return names


def print_report(report: dict[str, Any], records: dict[str, list[dict[str, Any]]]) -> None:
    """Print warnings, sanity checks, the result and the judge's contradictions."""
    print(report_head(report, "instructions"))
    print(aligned(table(report)))
    if differences := difference_table(report):
        print(f"\n{aligned(differences)}")
    for side, metrics in report.get("alpaca_eval", {}).items():
        shown = ", ".join(
            f"{key} {value if isinstance(value, str) else figure(value)}"
            for key, value in metrics.items()
        )
        print(f"  alpaca-eval's own metrics, {side}: {shown}")
    if report["reference"] == "base":
        print("  base is the reference: its win rate is 50 % by construction")
    print(f"  in brackets 95 % intervals; {report['statistics']}")
    for side, one in report["judged"].items():
        for line in unparsed_lines(one["unparsed_kinds"]):
            print(f"  {side}, {line}")
    against = [
        record for one in records.values() for record in one if any(record["contradictions"])
    ]
    for record in against[:SHOWN_CONTRADICTIONS]:
        print(
            f"  contradiction, row {record['row']}: verdicts {record['verdicts']} against the "
            "judge's own words"
        )
    print(f"  written: {', '.join(report['files'])}")


if __name__ == "__main__":
    with reported_to_launcher(), mistakes_in_one_line():
        main(sys.argv[1:])
