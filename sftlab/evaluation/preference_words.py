"""The scores of preference tuning in words: a table, and what a reader must know."""

from collections.abc import Iterable
from typing import Any

from sftlab.evaluation.significance import FEW_ROWS
from sftlab.runs.run_directory import START
from sftlab.tables import aligned, interval, p_value

# what is scored, and how it is called
SCORES = {
    "reward_accuracy": "reward accuracy",
    "reward_margin": "reward margin, nats",
    "chosen_reward": "reward of chosen answers, nats",
    "rejected_reward": "reward of rejected answers, nats",
    "chosen_likelier": "chosen side likelier a token",
    "start_perplexity": "response perplexity, test rows of the start",
    "answer_tokens": "tokens of an answer",
}
LEFT_OUT = {
    "without_a_token": "pairs left out: max_length leaves a side without a token of its answer",
    "equal_after_cut": "pairs left out: max_length makes their sides equal",
    "prompts_without_room": "prompts that leave no room for an answer, and are not answered",
}


def warnings(report: dict[str, Any], unchecked: Iterable[str | None]) -> list[str]:
    """Returns what a reader must know before believing the scores."""
    scores, found = report["scores"], [one for one in unchecked if one]
    if report["questions"] < FEW_ROWS:
        found.append(f"fewer than {FEW_ROWS} questions: the intervals are wide")
    low, high = scores["reward_accuracy"]["tuned"]["interval_95"]
    if (low or 0) <= 0.5 <= (1 if high is None else high):
        found.append("it is not shown that the chosen answers are preferred: 50 % is chance")
    if scores["chosen_reward"]["tuned"]["value"] < 0:
        found.append("chosen answers became less likely too, and rejected ones more so")
    before = "the start" if START in report["models"] else "base"
    if side := _shift(scores.get("start_perplexity")):
        lost = "is partly lost" if side > 0 else "is not lost"
        found.append(f"what the start had learnt {lost}: the perplexity of its test rows")
        found[-1] += " rose" if side > 0 else " fell"
    if side := _shift(scores.get("answer_tokens")):
        tuned, apart = (scores["answer_tokens"][key]["value"] for key in ("tuned", "difference"))
        change = apart / max(tuned - apart, 1)
        longer = "longer" if side > 0 else "shorter"
        found.append(f"answers are {100 * abs(change):.0f} % {longer} than those of {before}")
    return found


def _shift(score: dict[str, Any] | None) -> int:
    """Returns 1 where a difference is shown to be above 0, -1 below, 0 where neither is."""
    if score is None:
        return 0
    low, high = score["difference"]["interval_95"]
    return int(low is not None and low > 0) - int(high is not None and high < 0)


def lines_of(report: dict[str, Any]) -> list[str]:
    """Returns the report as lines to print."""
    sides, held = report["models"], report["held_out"]
    before = START if START in sides else "base"
    lines = [
        f"\n{report['run']}: {report['pairs']} held-out pairs of {report['questions']} questions "
        f"({held['dataset']})"
    ]
    if report["start"]:
        lines.append(f"  start: {report['start']['adapter']}")
    if rows := report["start_rows"]:
        lines.append(f"  its test rows: {rows['rows']} ({rows['dataset']})")
    lines.append(aligned([["", *sides, f"tuned - {before}", "p"], *_rows(report)]))
    lines.append(f"  in brackets 95 % intervals; {report['statistics'].replace('p_holm', 'p')}")
    lines.append("  p of rewards: against rewards that favour either side by chance")
    limit = report["generation"]["max_new_tokens"]
    for side, facts in report["answers"].items():
        cut = f"{facts['cut_at_max_new_tokens']} cut at {limit} tokens"
        lines.append(f"  {side} answers: {facts['empty']} empty, {cut}")
    lines += [f"  {said}: {held[what]}" for what, said in LEFT_OUT.items() if held[what]]
    if rows and rows["asked_in_training"]:
        lines.append(f"  test rows left out, asked in this training: {rows['asked_in_training']}")
    return [*lines, *(f"  warning: {warning}" for warning in report["warnings"])]


def _rows(report: dict[str, Any]) -> list[list[str]]:
    found = []
    for name, called in SCORES.items():
        if one := report["scores"].get(name):
            cells = [interval(one[side]) if side in one else "" for side in report["models"]]
            difference = interval(one["difference"]) if "difference" in one else ""
            found.append([called, *cells, difference, p_value(one["p_holm"])])
    return found
