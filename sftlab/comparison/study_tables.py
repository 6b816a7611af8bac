"""How do the figures of a study look as tables?"""

from collections.abc import Mapping, Sequence
from typing import Any

from sftlab.comparison.study_claims import ALIKE, most_apart
from sftlab.comparison.study_summary import CHANGED
from sftlab.tables import figure, p_value, preview, without_empty_columns

TITLES = {
    "tokens_per_s": "real tokens/s",
    "rows_per_s": "rows/s",
    "efficiency": "efficiency",
    "share_of_limit": "MFU",
    "peak_memory_gb": "peak GB a rank",
    "step_time_s": "step s",
    "step_parameters_gb": "parameters GB",
    "step_gradients_gb": "gradients GB",
    "step_optimizer_state_gb": "optimizer state GB",
    "step_activations_gb": "activations GB",
    "step_peak_gb": "step peak GB",
    "collectives": "collectives a step",
    "collectives_mb": "collectives MB",
    "trainable_parameters": "trainable parameters",
    "train_loss": "train loss",
    "largest_loss_difference": "largest loss difference",
    "validation_loss": "validation loss",
    "tuned response_perplexity": "response perplexity",
    "tuned bleu": "BLEU",
    "tuned rougeL": "ROUGE-L",
    "base known_perplexity": "perplexity of known text, base",
    "tuned known_perplexity": "perplexity of known text",
}
ARROWS = {"up": "↑", "down": "↓", "same": "="}

Table = list[list[str]]


def title_of(key: str) -> str:
    """Returns what a figure is called in tables and plots; an lm-eval task has its own name."""
    if key in TITLES:
        return TITLES[key]
    if key.startswith("base "):
        return key.removeprefix("base ") + ", base"
    return key.removeprefix("tuned ")


def summary_table(summary: Sequence[Mapping[str, Any]]) -> Table:
    """Returns a heading and a row a cell; columns without any value are left out."""
    published = [key for key in summary[0] if key.startswith("published ")]
    shown = [key for key in TITLES if key in summary[0]]
    of_tasks = (key for key in summary[0] if key.startswith(("base ", "tuned ")))
    shown += [k for k in of_tasks if k not in shown and not k.endswith((" low", " high"))]
    lines = [["cell", "runs", *map(title_of, shown), *published, "ended"]]
    for line in summary:
        cells = [line["cell"], str(line["runs"]), *(_with_range(line, key) for key in shown)]
        cells += ["" if line[key] is None else str(line[key]) for key in published]
        ended = preview(f"{line['status']}: {line['reason'] or ''}", 90)
        lines.append([*cells, "" if line["status"] == "succeeded" else ended])
    return without_empty_columns(lines)


def _with_range(line: Mapping[str, Any], key: str) -> str:
    """Returns the median with lowest and highest in brackets, where they differ."""
    if line[key] is None:
        return ""
    low, high = line[f"{key} low"], line[f"{key} high"]
    return figure(line[key]) + ("" if low == high else f" [{figure(low)}, {figure(high)}]")


def claims_table(found: Sequence[Mapping[str, Any]]) -> Table:
    """Returns a heading and a row a comparison with the reference."""
    lines = [["cell", "score", "difference", "p", "seeds", "verdict"]]
    for one in found:
        ends = "" if one["low"] is None else f" [{figure(one['low'])}, {figure(one['high'])}]"
        difference = figure(one["difference"]) + ends
        p = "" if one["p_holm"] is None else p_value(one["p_holm"])
        words = [one["cell"], title_of(one["score"]), difference, p, str(one["seeds"])]
        bound = f": {most_apart(one)}" if one["word"] == ALIKE and one["low"] is not None else ""
        lines.append([*words, one["word"] + bound])
    return lines


def effects_table(changed: Sequence[Mapping[str, Any]]) -> Table:
    """Returns a heading and a row a technique."""
    keys = [key for key in CHANGED if any(key in one for one in changed)]
    lines = [["technique", *(TITLES[key].removesuffix(" GB").removesuffix(" s") for key in keys)]]
    lines += [[one["factor"], *(_effect(one, key) for key in keys)] for one in changed]
    return lines


def _effect(one: Mapping[str, Any], key: str) -> str:
    if key not in one:
        return ""
    low, high = one[f"{key} low"], one[f"{key} high"]
    return f"{ARROWS[one[f'{key} is']]} {one[key]:.2f} [{low:.2f}, {high:.2f}]"
