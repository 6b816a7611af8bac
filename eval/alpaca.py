"""AlpacaEval's 805 instructions: a judge compares base's and tuned's answers with a reference, in
both orders.

python eval/alpaca.py --run runs/x --judge prometheus-eval/prometheus-7b-v2.0 [--reference base|FILE|NAME] [--limit 100]
    [--judge_in_4bit | --judge_url http://localhost:8000/v1] [--agreement annotations.json]
python eval/alpaca.py --run runs/x --annotators weighted_alpaca_eval_gpt4_turbo

The judge is tried first where the right answer is known (the canaries). Writes RUN/eval/alpaca.json
(the newest entry of each judge and reference) and, with every prompt, answer, judgement and
verdict, alpaca-judgements-*.jsonl and alpaca-canaries-*.jsonl beside it. Answers and judgements are
kept as they come: the same command goes on after a kill, and scores again without a GPU.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.preload  # noqa: F401

import argparse
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from sftlab.judging.alpaca_annotators import ALPACA_EVAL_2, Annotators, official
from sftlab.judging.sanity_checks import UNPARSED_REFUSED, UNPARSED_SAID, Canaries, spread
from sftlab.judging.model_answers import Contestants, refuse_twins
from sftlab.evaluation.answer_file import AnswerFile, answer_facts, digest
from sftlab.evaluation.generation import Answer, Sampling
from sftlab.judging.judges import add_judge_flags, judge_from
from sftlab.judging.judgement_files import (
    canary_table,
    judgement_hashes,
    keep_entry,
    share,
    write_records,
)
from sftlab.judging.length_control import length_controlled, lengths, mean_characters
from sftlab.judging.alpaca_files import Task, read_preferences, read_task
from sftlab.evaluation.base_and_tuned import finished_run, one_sentence
from sftlab.judging.pairwise import Pair, judge_pairs, tally, win_rates
from sftlab.runs.environment import environment
from sftlab.runs.run_directory import SIDES, adapter_hash
from sftlab.evaluation.significance import FEW_ROWS, method
from sftlab.tables import aligned, figure, interval, p_value, percent

Judged = Callable[..., list[dict[str, Any]]]
SHOWN_CONTRADICTIONS = 3
ORDERS = (("both orders agree", "orders_agree"), ("first preferred", "first_preferred"))
NAMED = {"mean_characters": "mean characters", "empty": "empty answers"}
# At which the base model answers twice: two draws of one model are the noise floor.
NOISE_TEMPERATURE = 0.7


def main(argv: list[str]) -> None:
    """Answer, try the judge, let it compare, write, print."""
    arguments = parse_arguments(argv)
    with one_sentence(": take a smaller --batch_size or --judge_batch_size; what is done is kept"):
        evaluate(arguments)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path, help="a finished run's directory")
    add_judge_flags(parser)
    parser.add_argument(
        "--annotators", help="judge by this config of alpaca-eval instead (most need an API key)"
    )
    parser.add_argument(
        "--reference",
        default="gpt4_1106_preview",
        help="base, a file of outputs, or a published name",
    )
    parser.add_argument(
        "--instructions", type=Path, help="a file of instructions (default: those of the reference)"
    )
    parser.add_argument(
        "--agreement", type=Path, help="published annotations that the judge must agree with"
    )
    parser.add_argument(
        "--limit", type=int, default=0, help="the first n instructions (default: all)"
    )
    parser.add_argument("--canaries", type=int, default=100, help="pairs of each canary")
    parser.add_argument("--batch_size", type=int, default=32, help="answers at once")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="longest answer")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="of the answers; 0 (default) is greedy"
    )
    parser.add_argument(
        "--allow-unparsed", action="store_true", help="give a win rate whatever share is unparsed"
    )
    return parser.parse_args(argv)


def evaluate(arguments: argparse.Namespace) -> None:
    """The whole evaluation; ValueError says in one sentence why it cannot be done."""
    if arguments.limit < 0 or arguments.batch_size < 1 or arguments.canaries < 1:
        raise ValueError("--limit must be 0 (all) or more, --batch_size and --canaries at least 1")
    sampling = Sampling(arguments.max_new_tokens, arguments.temperature)
    run = finished_run(arguments.run)
    task = read_task(arguments.reference, arguments.instructions, arguments.limit)
    preferences = read_preferences(arguments.agreement) if arguments.agreement else None
    judged, facts = choose_judge(arguments)
    contestants = Contestants(arguments.run, run, arguments.batch_size)
    asked = [[{"role": "user", "content": text}] for text in task.questions.instructions]
    answers = {
        side: contestants.answers(side, asked, sampling, f"{side} answers") for side in SIDES
    }
    prompts_cut = contestants.prompts_cut // len(SIDES)
    about = {side: answer_facts(answers[side]) | mean_characters(answers[side]) for side in SIDES}
    refuse_twins(about)
    few = spread(range(len(asked)), arguments.canaries)
    noise = Sampling(arguments.max_new_tokens, NOISE_TEMPERATURE)
    drawn = contestants.draws([asked[row] for row in few], noise, "base answers drawn")
    contestants.free()

    canaries = try_judge(judged, task, few, drawn, preferences, arguments.canaries)
    records = compare_with_reference(judged, task, answers)
    canaries.behaviour([record for side in records.values() for record in side])
    report = facts_of(arguments, task, facts, canaries, records)
    report |= {"answers": about, "instructions_cut": prompts_cut}
    refused = unparsed_rate(report) > UNPARSED_REFUSED and not arguments.allow_unparsed
    if not refused:
        report |= rates(arguments, task, records, answers)
    report["warnings"] = warnings(arguments, report)
    report["files"] = write(arguments.run / "eval", report, records, canaries)
    print_report(report, records)
    if refused:
        sys.exit(
            f"error: {percent(unparsed_rate(report))} of the judgements hold no verdict, more than "
            f"{percent(UNPARSED_REFUSED)}: no win rate is given without --allow-unparsed; every "
            "judgement is in the "
            "files named above"
        )


def facts_of(
    arguments: argparse.Namespace,
    task: Task,
    judge: dict[str, Any],
    canaries: Canaries,
    records: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    """Who judged what and how, whether that judge can be believed, and what it did with the pairs."""
    hashes = judgement_hashes(records, "answer", "judgements")
    return {
        "title": title(arguments, task, judge),
        "run": str(arguments.run),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "adapter_hash": adapter_hash(arguments.run),
        "rows": len(task.questions.instructions),
        "questions_hash": digest(
            [task.questions.instructions, task.reference.texts if task.reference else None]
        ),
        "reference": task.reference.name if task.reference else "base",
        "judge": judge,
        "judge_fit": canaries.fit,
        "canaries": canaries.rows,
        "judged": {side: tally(one) | {"hash": hashes[side]} for side, one in records.items()},
        "scores": {},
        "generation": {
            "temperature": arguments.temperature,
            "max_new_tokens": arguments.max_new_tokens,
        },
        "statistics": method(len(task.questions.instructions), "instructions"),
        **environment(),
    }


def choose_judge(arguments: argparse.Namespace) -> tuple[Judged, dict[str, Any]]:
    """What judges pairs, and the facts that name it."""
    folder = arguments.run / "eval"
    if bool(arguments.judge) == bool(arguments.annotators):
        raise ValueError("expected either --judge or --annotators, and one of them")
    if arguments.annotators:
        annotators = Annotators(arguments.annotators, folder)
        return annotators.judged, annotators.facts
    judge, style = judge_from(arguments)
    facts = judge.facts | {"format": style.name}
    file = AnswerFile(folder, {k: v for k, v in facts.items() if k != "server"}, kind="verdicts")
    return partial(judge_pairs, judge, style, file=file, size=arguments.judge_batch_size), facts


def try_judge(
    judged: Judged,
    task: Task,
    few: list[int],
    drawn: list[list[Answer]],
    preferences: tuple[list[Pair], list[bool], str] | None,
    count: int,
) -> Canaries:
    """The canaries: what the judge says where the right answer is known."""
    canaries = Canaries(lambda pairs, name: judged(pairs, title=name))
    instructions = task.questions.instructions
    known = [Pair(row, instructions[row], task.good[row], "") for row in few]
    canaries.same_answer(known)
    canaries.over_shuffled(known)
    again = zip(few, *drawn, strict=True)
    canaries.noise_floor(
        [Pair(row, instructions[row], one.text, two.text) for row, one, two in again]
    )
    if preferences:
        pairs, preferred, whose = preferences
        chosen = spread(range(len(pairs)), count)
        canaries.agreement([pairs[i] for i in chosen], [preferred[i] for i in chosen], whose)
    return canaries


def compare_with_reference(
    judged: Judged, task: Task, answers: dict[str, list[Answer]]
) -> dict[str, list[dict[str, Any]]]:
    """The judge's records of each side against the reference; base is not judged against itself."""
    reference = (
        task.reference.texts if task.reference else [answer.text for answer in answers["base"]]
    )
    sides = SIDES if task.reference else ("tuned",)
    found = {}
    for side in sides:
        rows = enumerate(zip(task.questions.instructions, answers[side], reference, strict=True))
        pairs = [
            Pair(row, instruction, answer.text, text) for row, (instruction, answer, text) in rows
        ]
        found[side] = judged(pairs, title=f"judging {side}")
    return found


def rates(
    arguments: argparse.Namespace,
    task: Task,
    records: dict[str, list[dict[str, Any]]],
    answers: dict[str, list[Answer]],
) -> dict[str, Any]:
    """Win rates, what they are at equal length, and alpaca-eval's own metrics where its annotators
    judged.

    Nothing where a model has no verdict at all.
    """
    scores = {side: [record["score"] for record in one] for side, one in records.items()}
    halves = [None if one is None else 0.5 for one in scores["tuned"]]
    if any(set(one) == {None} for one in scores.values()):
        return {}
    found: dict[str, Any] = {
        "scores": {"win_rate": win_rates(scores.get("base", halves), scores["tuned"])}
    }
    texts = {side: [answer.text for answer in answers[side]] for side in SIDES}
    reference = task.reference.texts if task.reference else texts["base"]
    found["length"] = {side: lengths(one, texts[side], reference) for side, one in scores.items()}
    found["length_controlled"] = length_controlled(scores, texts, reference)
    if arguments.annotators:
        name = task.reference.name if task.reference else "base"
        control = is_alpaca_eval_2(arguments, task)
        found["alpaca_eval"] = {
            side: official(one, (side, name), control) for side, one in records.items()
        }
    return found


def is_alpaca_eval_2(arguments: argparse.Namespace, task: Task) -> bool:
    """Whether judge, reference and instructions are those of AlpacaEval 2."""
    whole = task.questions.published and not arguments.limit
    return (
        whole
        and task.reference is not None
        and (arguments.annotators, task.reference.name) == ALPACA_EVAL_2
    )


def title(arguments: argparse.Namespace, task: Task, facts: dict[str, Any]) -> str:
    """What the score is called:

    AlpacaEval 2 only with its judge, its reference and all of its instructions.
    """
    judge = Path(facts["judge"]).name
    reference = task.reference.name if task.reference else "base"
    number = len(task.questions.instructions)
    if is_alpaca_eval_2(arguments, task):
        return f"AlpacaEval 2, judge {judge}, reference {reference}"
    name = (
        "AlpacaEval instructions"
        if task.questions.published
        else f"instructions of {task.questions.name}"
    )
    first = f", first {number}" if arguments.limit else ""
    return f"{name}{first}, judge {judge}, reference {reference}"


def unparsed_rate(report: dict[str, Any]) -> float:
    """The largest share of judgements without a verdict among the sides."""
    return max(one["unparsed"]["value"] for one in report["judged"].values())


def warnings(arguments: argparse.Namespace, report: dict[str, Any]) -> list[str]:
    """What a reader must know before believing the table."""
    found = []
    if not report["judge_fit"]:
        failed = [row["canary"] for row in report["canaries"] if not row["passed"]]
        found.append(
            f"the judge is UNFIT, it failed: {', '.join(failed)}; what it says of the models means "
            "nothing"
        )
    if unparsed_rate(report) > UNPARSED_SAID:
        found.append(
            f"{percent(unparsed_rate(report))} of the judgements hold no verdict and are left out"
        )
    if not arguments.agreement:
        found.append(
            "the judge's agreement with GPT-4 was not tried: pass --agreement with published "
            "annotations"
        )
    if report["rows"] < FEW_ROWS:
        found.append(f"fewer than {FEW_ROWS} instructions: the intervals are rough")
    if report["instructions_cut"]:
        found.append(
            f"{report['instructions_cut']} instructions were too long for the model: cut from the "
            "middle"
        )
    for side, one in report["judged"].items():
        if one["pairs_cut"]:
            found.append(
                f"{one['pairs_cut']} pairs of {side} were too long for the judge: answers cut from "
                "the middle"
            )
    return found


def write(
    folder: Path, report: dict[str, Any], records: dict[str, list], canaries: Canaries
) -> list[str]:
    """The entry in alpaca.json, and the records beside it; returns the files' names."""
    sides = [{"side": side, **record} for side, one in records.items() for record in one]
    names = write_records(
        folder, "alpaca", report["title"], judgements=sides, canaries=canaries.records
    )
    keep_entry(folder / "alpaca.json", report | {"files": names})
    return names


def table(report: dict[str, Any]) -> list[list[str]]:
    """Win rates, what the judge did with the pairs, and lengths, a column a model."""
    mark = "" if report["judge_fit"] else " (UNFIT judge)"
    lines = [["", "base", "tuned", "tuned - base", "p"]]
    if report["scores"]:
        one = report["scores"]["win_rate"]
        cells = [interval(one[k]) for k in ("base", "tuned", "difference")]
        lines.append([f"win rate, %{mark}", *cells, p_value(one["p_value"])])
    controlled = report.get("length_controlled") or {}
    if controlled:
        cells = [
            interval(controlled[k]) if k in controlled else ""
            for k in ("base", "tuned", "difference")
        ]
        lines.append([f"at equal length, %, fitted to this judge's own verdicts{mark}", *cells, ""])
    judged, length = report["judged"], report.get("length", {})
    for name, key in (("ties", "ties"), ("unparsed", "unparsed"), *ORDERS):
        lines.append(
            [name, *(share(judged[side][key]) if side in judged else "" for side in SIDES), "", ""]
        )
    for name in ("longer", "shorter") if length else ():
        lines.append(
            [
                f"wins when {name}",
                *(share(length[s][name]) if s in length else "" for s in SIDES),
                "",
                "",
            ]
        )
    for name in ("mean_characters", "empty"):
        lines.append(
            [NAMED[name], *(figure(report["answers"][side][name]) for side in SIDES), "", ""]
        )
    return lines


def print_report(report: dict[str, Any], records: dict[str, list[dict[str, Any]]]) -> None:
    """Warnings, the canaries, the result, and the contradictions."""
    print(
        f"\n{report['title']}: base against tuned of {report['run']} on {report['rows']} "
        "instructions"
    )
    for warning in report["warnings"]:
        print(f"  warning: {warning}")
    print(
        f"\n{canary_table(report['canaries'])}\n  the judge is "
        f"{'fit' if report['judge_fit'] else 'UNFIT'}\n"
    )
    print(aligned(table(report)))
    for side, metrics in report.get("alpaca_eval", {}).items():
        shown = ", ".join(
            f"{key} {value if isinstance(value, str) else figure(value)}"
            for key, value in metrics.items()
        )
        print(f"  alpaca-eval's own metrics, {side}: {shown}")
    if report["reference"] == "base":
        print("  base is the reference: its win rate is 50 % by construction")
    print(f"  in brackets 95 % intervals; {report['statistics']}")
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
    main(sys.argv[1:])
