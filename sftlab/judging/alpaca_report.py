"""AlpacaEval's scores: what they are called, win rates, and the printed table."""

from pathlib import Path
from typing import Any

from sftlab.evaluation.generation import Answer
from sftlab.evaluation.significance import add_holm
from sftlab.judging.alpaca_annotators import ALPACA_EVAL_2, official
from sftlab.judging.alpaca_files import Task
from sftlab.judging.judgement_files import share, unfit_mark
from sftlab.judging.length_control import length_controlled, lengths
from sftlab.judging.pairwise import win_rates
from sftlab.runs.run_directory import START
from sftlab.tables import figure, interval, p_value

# rows of the printed table: what a reader sees, and its key in the entry
JUDGED_ROWS = (
    ("ties", "ties"),
    ("unparsed", "unparsed"),
    ("both orders agree", "orders_agree"),
    ("first preferred", "first_preferred"),
)
ANSWER_ROWS = (("mean characters", "mean_characters"), ("empty answers", "empty"))


def title(task: Task, judge: str, annotators: str | None, limit: int) -> str:
    """Returns what the score is called.

    It is AlpacaEval 2 only with that benchmark's judge, reference and whole set of instructions.
    """
    judge = Path(judge).name
    if is_alpaca_eval_2(task, annotators, limit):
        return f"AlpacaEval 2, judge {judge}, reference {reference_name(task)}"
    published = task.questions.published
    name = "AlpacaEval instructions" if published else f"instructions of {task.questions.name}"
    first = f", first {len(task.questions.instructions)}" if limit else ""
    return f"{name}{first}, judge {judge}, reference {reference_name(task)}"


def reference_name(task: Task) -> str:
    """Returns the name of the model that answers are compared with."""
    return task.reference.name if task.reference else "base"


def is_alpaca_eval_2(task: Task, annotators: str | None, limit: int) -> bool:
    """Whether judge, reference and instructions are those of AlpacaEval 2."""
    whole = task.questions.published and not limit
    return (
        whole and task.reference is not None and (annotators, task.reference.name) == ALPACA_EVAL_2
    )


def rates(
    task: Task,
    annotators: str | None,
    limit: int,
    records: dict[str, list[dict[str, Any]]],
    answers: dict[str, list[Answer]],
) -> dict[str, Any]:
    """Returns win rates, by length and at equal length.

    alpaca-eval's own metrics are added where its `annotators` judged. Returns nothing where a
    model has no verdict at all.
    """
    scores = {side: [record["score"] for record in one] for side, one in records.items()}
    if any(set(one) == {None} for one in scores.values()):
        return {}
    found: dict[str, Any] = {"scores": {"win_rate": win_rates(scores.get("base"), scores["tuned"])}}
    texts = {side: [answer.text for answer in of] for side, of in answers.items()}
    if START in scores:
        found["with_start"] = _with_start(scores)
    reference = task.reference.texts if task.reference else texts["base"]
    found["length"] = {side: lengths(one, texts[side], reference) for side, one in scores.items()}
    pair = {side: one for side, one in scores.items() if side != START}
    found["length_controlled"] = length_controlled(pair, texts, reference)
    if annotators:
        control = is_alpaca_eval_2(task, annotators, limit)
        found["alpaca_eval"] = {
            side: official(one, (side, reference_name(task)), control)
            for side, one in records.items()
        }
    return found


def _with_start(scores: dict[str, list[float | None]]) -> dict[str, Any]:
    """Returns the start's win rate, and the differences of the three models' win rates.

    Their p-values are corrected for their number (`p_holm`).
    """
    base = scores.get("base")
    pairs = {
        f"{START} - base": win_rates(base, scores[START]),
        f"tuned - {START}": win_rates(scores[START], scores["tuned"]),
        "tuned - base": win_rates(base, scores["tuned"]),
    }
    add_holm(pairs)
    own = pairs[f"{START} - base"]["tuned"]
    kept = ("value", "interval_95")
    differences = {
        name: {key: one["difference"][key] for key in kept}
        | {key: one[key] for key in ("p_value", "p_holm")}
        for name, one in pairs.items()
    }
    return {"win_rate": own, "differences": differences}


def unparsed_rate(report: dict[str, Any]) -> float:
    """Returns the larger of the sides' shares of judgements without a verdict."""
    return max(one["unparsed"]["value"] for one in report["judged"].values())


def _at_equal_length(one: dict[str, Any] | None) -> str:
    """Returns a rate at equal length, or on how few answers it would rest."""
    if one is None:
        return ""
    if "value" not in one:
        return f"withheld: {one['rests_on']} of {one['rows']} answers reach that length"
    rests = f" (rests on {one['rests_on']} of {one['rows']})" if "rests_on" in one else ""
    return f"{interval(one)}{rests}"


def table(report: dict[str, Any]) -> list[list[str]]:
    """Returns the result as lines of cells, with a column for each model."""
    mark, sides = unfit_mark(report), list(report["answers"])
    shown = [*sides, "difference"]
    lines = [["", *sides, "tuned - base", "p"]]
    if report["scores"]:
        one = report["scores"]["win_rate"]
        p = (
            report["with_start"]["differences"]["tuned - base"]["p_holm"]
            if START in sides
            else None
        )
        found = one | ({START: report["with_start"]["win_rate"]} if START in sides else {})
        cells = [interval(found[name]) for name in shown]
        lines.append([f"win rate, %{mark}", *cells, p_value(one["p_value"] if p is None else p)])
    if controlled := report.get("length_controlled"):
        cells = [_at_equal_length(controlled.get(name)) for name in shown]
        lines.append([f"at equal length, %, fitted to this judge's own verdicts{mark}", *cells, ""])
    judged, length = report["judged"], report.get("length", {})
    for name, key in JUDGED_ROWS:
        cells = [share(judged[side][key]) if side in judged else "" for side in sides]
        lines.append([name, *cells, "", ""])
    for name in ("longer", "shorter") if length else ():
        cells = [share(length[side][name]) if side in length else "" for side in sides]
        lines.append([f"wins when {name}", *cells, "", ""])
    for name, key in ANSWER_ROWS:
        cells = [figure(report["answers"][side][key]) for side in sides]
        lines.append([name, *cells, "", ""])
    return lines


def difference_table(report: dict[str, Any]) -> list[list[str]]:
    """Returns the differences of three models' win rates as lines of cells; [] of two models."""
    if "with_start" not in report:
        return []
    differences = report["with_start"]["differences"]
    lines = [
        [f"difference of win rates, %{unfit_mark(report)}", "", f"p, Holm over {len(differences)}"]
    ]
    for name, one in differences.items():
        lines.append([name, interval(one), p_value(one["p_holm"])])
    return lines
