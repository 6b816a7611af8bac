"""How did a run end, what was measured, and which scores are its own? Read from its directory."""

import hashlib
import json
import math
import re
import socket
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sftlab.comparison.result_files import (
    read_judged,
    read_preferences,
    read_quality,
    read_records,
    read_tasks,
    read_text_scores,
)
from sftlab.evaluation.significance import compare
from sftlab.evaluation.text_metrics import NAMES, PARTS, paired_scores
from sftlab.runs.made_files import result_name
from sftlab.runs.run_directory import SIDES, adapter_hash, read_run
from sftlab.tables import counted

# A run has diverged where the mean loss of its last tenth is this many times that of its first.
# Single losses differ from batch to batch.
GROWTH = 1.5
# Memory of a step, by part (sftlab/measurement/memory.py).
STEP_PARTS = ("parameters", "gradients", "optimizer_state", "activations", "peak")
_RAN = ("precision", "strategy", "world_size", "trainable_parameters")
_MEASURED = (
    "step_time_s",
    "tokens_per_s",
    "rows_per_s",
    "share_of_limit",
    "limit",
    "train_seconds",
    "train_loss",
    "validation_loss",
)


class RunResults(NamedTuple):
    """A run directory: run.json, the scores of the run's own adapter, and hashes of what it holds.

    `quality` is quality.json ({} where there is none of this adapter) and `records` the lines of
    quality.jsonl. `texts` are perplexities of plain text, `tasks` the entries of harness.json, and
    `judged` those of alpaca.json and mt_bench.json. `preferences` is preferences.json. `stale`
    names the scores that are of another adapter and were left out. `held`
    has the hashes of adapter, answers and judgements.
    """

    folder: Path
    run: dict[str, Any]
    quality: dict[str, Any]
    texts: list[dict[str, Any]]
    tasks: list[dict[str, Any]]
    judged: list[dict[str, Any]]
    records: list[dict[str, Any]]
    stale: list[str]
    held: dict[str, str]
    preferences: dict[str, Any]


def find_runs(paths: Sequence[Path]) -> dict[str, Path]:
    """Returns run directories by name; `paths` are run directories, or folders of them.

    Raises ValueError for a path without a run.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        if (path / "run.json").is_file():
            found = [path]
        else:
            found = sorted(record.parent for record in path.glob("*/run.json"))
        if not found:
            raise ValueError(
                f"no run in {path}: expected a run directory (it has a run.json) or a folder of "
                "them"
            )
        folders |= {folder.resolve(): folder for folder in found}
    names = [folder.name for folder in folders]
    return {
        f.name if names.count(f.name) == 1 else f"{f.parent.name}/{f.name}": given
        for f, given in folders.items()
    }


def read_results(folder: Path, scored_on: str | None = None) -> RunResults:
    """Returns what a run directory holds; ValueError names a file that cannot be read.

    Its scores are those of the test split, or of the data set whose file is called `scored_on`.
    """
    run, evaluated = read_run(folder), folder / "eval"
    adapter, stale = adapter_hash(folder), []
    scored = result_name("quality", scored_on)
    quality = read_quality(evaluated / f"{scored}.json")
    if scored_on and quality and quality["held_out"].get("dataset") != scored_on:
        quality = {}  # a file of the same name elsewhere
    if quality and quality["adapter_hash"] != adapter:
        quality, stale = {}, ["stale scores"]
    entries: dict[str, list[dict[str, Any]]] = {}
    for name in ("harness", "alpaca", "mt_bench"):
        read = read_tasks if name == "harness" else read_judged
        found = read(evaluated / f"{name}.json")
        entries[name] = [one for one in found if one["adapter_hash"] == adapter]
        stale += [f"stale {name} scores"] if len(entries[name]) < len(found) else []
    judged = entries["alpaca"] + entries["mt_bench"]
    written = read_text_scores(evaluated)
    texts = [one for one in written if one["adapter_hash"] == adapter]
    stale += ["stale perplexity of text"] if len(texts) < len(written) else []
    records = read_records(evaluated / f"{scored}.jsonl") if quality else []
    held = _hashes(evaluated, adapter, records, judged)
    tasks = entries["harness"]
    preferences = read_preferences(evaluated / "preferences.json")
    if preferences and preferences["adapter_hash"] != adapter:
        preferences, stale = {}, [*stale, "stale scores of preferences"]
    return RunResults(folder, run, quality, texts, tasks, judged, records, stale, held, preferences)


def _hashes(
    evaluated: Path,
    adapter: str | None,
    records: Sequence[Mapping[str, Any]],
    judged: Sequence[Mapping[str, Any]],
) -> dict[str, str]:
    """Returns the hashes of adapter, answers and judgements, by what they are."""
    held = {"adapter": adapter} if adapter else {}
    if records:
        texts = [record["tuned"]["text"] for record in records]
        held["answers"] = _hash(json.dumps(texts).encode())
    files = [path for path in sorted(evaluated.glob("*judg*.jsonl")) if path.stat().st_size]
    held |= {f"judgements ({path.name})": _hash(path.read_bytes()) for path in files}
    for what, part in (("answers", "answers"), ("judgements", "judged")):
        held |= {f"{what} ({one['title']})": one[part]["tuned"]["hash"] for one in judged}
    return held


def outcome(run: Mapping[str, Any]) -> tuple[str, str]:
    """Returns a run's status as a report shows it, and the reason.

    'out of memory' and 'diverged' are outcomes of their own.
    """
    reason = run.get("reason") or ""
    if re.search(r"out ?of ?memory", reason, re.IGNORECASE):
        return "out of memory", reason
    if why := _divergence(run.get("losses") or [], reason):
        return "diverged", why
    host, process = run.get("host_pid") or (None, None)
    here = run["status"] == "running" and host == socket.gethostname()
    if here and not Path(f"/proc/{process}").exists():
        return "running", "its process is gone: start it again to continue"
    return run["status"], reason


def _divergence(losses: Sequence[Sequence[float]], reason: str) -> str:
    """Returns how a run's losses (step, loss) diverged; empty where they did not."""
    for step, loss in losses:
        if not math.isfinite(loss):
            return f"the loss is {loss} at step {step}"
    if "diverged" in reason:
        return re.sub(r"^(\w+: )?diverged: ", "", reason)
    if not losses:
        return ""
    few = max(1, len(losses) // 10)
    first, last = (sum(loss for _, loss in part) / few for part in (losses[:few], losses[-few:]))
    if last > GROWTH * first:
        return f"the loss grew from {first:.4g} to {last:.4g} (means of {few} logged)"
    return ""


def figures(one: RunResults, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row of the CSV: every figure as it was measured, None where it was not."""
    measured = one.run.get("measured") or {}
    row = dict(zip(("status", "reason"), outcome(one.run), strict=True))
    row |= {key: measured.get(key, facts.get(key)) for key in (*_RAN, *_MEASURED)}
    row["lora_scale"] = " ".join(map(str, facts["lora_scale"]))
    row |= _memory_figures(measured.get("peak_memory") or [{}])
    collectives = (measured.get("collectives") or {}).values()
    row["collectives"] = sum(kind["calls"] for kind in collectives) or None
    row["collectives_mb"] = round(sum(kind["mb"] for kind in collectives), 3) or None
    for score, found in _scores(one).items():
        for side in SIDES:
            value, low, high = (
                (found[side]["value"], *found[side]["interval_95"]) if found else (None, None, None)
            )
            row |= {f"{side} {score}": value}
            row |= {f"{side} {score} low": low, f"{side} {score} high": high}
    for name, found in one.preferences.get("scores", {}).items():
        for side in (side for side in one.preferences["models"] if side in found):
            key = f"preferences: {side} {name}"
            low, high = found[side]["interval_95"]
            row |= {key: found[side]["value"], f"{key} low": low, f"{key} high": high}
    again = ["continued: figures of all starts together"] if one.run.get("interruptions") else []
    return row | {"note": "; ".join(one.stale + again)}


def _memory_figures(peaks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the largest memory of any rank, in GB; `peaks` has an entry a rank."""
    kind = "allocated" if "allocated_gb" in peaks[0] else "resident"
    row: dict[str, Any] = {
        "peak_memory_gb": max((peak[f"{kind}_gb"] for peak in peaks if peak), default=None),
        "peak_memory_is": kind if peaks[0] else None,
    }
    steps = [peak["step"] for peak in peaks if "step" in peak]
    for part in STEP_PARTS:
        row[f"step_{part}_gb"] = max((step.get(f"{part}_gb", 0) for step in steps), default=None)
    return row


def _scores(one: RunResults) -> dict[str, Any]:
    """Returns the scores of base and tuned by their name in a report; None where not scored."""
    scores = {score: one.quality.get("scores", {}).get(score) for score in NAMES}
    for text in one.texts:
        scores[perplexity_of(text["held_out"]["dataset"])] = text["scores"]["text_perplexity"]
    for task in one.tasks:
        plain = "" if task["chat_template"] else " plain"
        limit = f" first {task['limit']}" if task["limit"] else ""
        name = f"{task['task']} {task['few_shot']}-shot{plain}{limit}"
        scores[name] = task["metrics"][task["main_metric"]]
    for judged in one.judged:
        unfit = "" if judged["judge_fit"] else ", UNFIT judge"
        for name, what in (("win_rate", "win rate %"), ("overall", "mean rating")):
            if name in judged["scores"]:
                scores[f"{what}, {judged['title']}{unfit}"] = judged["scores"][name]
    return scores


def perplexity_of(dataset: str) -> str:
    """Returns what a report calls the perplexity of a data set of plain text."""
    return f"perplexity of {Path(dataset).name}"


def about(run: Mapping[str, Any]) -> dict[str, str]:
    """Returns hardware, versions, model, data and training of a run, each in one line."""
    recipe, data, hardware = run["recipe"], run.get("data") or {}, run.get("hardware", {})
    splits = [name for name in ("train", "validation", "test") if name in data]
    sizes = [f"{name} {data[name]['rows']}" for name in splits]
    cpu = f"{hardware.get('cpu_cores')} CPU cores, {hardware.get('machine')}"
    length = counted(recipe["num_train_epochs"], "epoch")
    if recipe["max_steps"] > 0:
        length = counted(recipe["max_steps"], "step")
    return {
        "hardware": hardware.get("gpu") or cpu,
        "versions": ", ".join(f"{name} {it}" for name, it in run.get("versions", {}).items() if it),
        "model": recipe["model_name_or_path"],
        "data": ", ".join([recipe["dataset_name"], *sizes]) + " rows" * bool(sizes),
        "training": f"{length}, global batch {recipe['global_batch_size']}, "
        f"max_length {recipe['max_length']}",
    }


def duplicates(runs: Mapping[str, RunResults]) -> list[tuple[str, str, str]]:
    """Returns (run, run, what) of every two runs with the same adapter, answers or judgements."""
    found = []
    for a, b in combinations(runs, 2):
        same = [what for what, content in runs[a].held.items() if content in runs[b].held.values()]
        found += [(a, b, ", ".join(same))] if same else []
    return found


def compare_tuned(
    runs: Mapping[str, RunResults], reference: str, scores: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Compare each other run's tuned `scores` with the reference's, row by row.

    Returns the comparisons by run and score, and a line for what cannot be compared. Runs are
    compared on the same held-out rows alone, and in perplexity only where they cut them into the
    same tokens.
    """
    compared, left_out, first = {}, [], runs[reference].records
    for name, records in ((name, one.records) for name, one in runs.items() if name != reference):
        if _held_out(records) != _held_out(first):
            left_out.append(f"{name} ({'other held-out rows' if records else 'no scores'})")
            continue
        pairs = paired_scores(*([record["tuned"] for record in side] for side in (first, records)))
        likelihoods = pairs["response_perplexity"]
        alike = np.array_equal(likelihoods.base[:, 1], likelihoods.tuned[:, 1])
        left_out += [] if alike else [f"perplexity of {name} (its tokens are others)"]
        left_out += [
            f"{NAMES[score]} of {name} ({_why_not(score, records)})"
            for score in scores
            if score not in pairs
        ]
        chosen = {
            score: pairs[score]
            for score in scores
            if score in pairs and (alike or "perplexity" not in score)
        }
        clusters = [record.get("conversation", record["row"]) for record in records]
        compared[name] = compare(chosen, clusters=clusters)
    return compared, left_out


def _why_not(score: str, records: Sequence[Mapping[str, Any]]) -> str:
    if all(PARTS[score][1] in record["tuned"] for record in records):
        return "the references are too short for it"
    return "scored without it: evaluate both runs again"


def _held_out(records: Sequence[Mapping[str, Any]]) -> list[tuple[Any, str]]:
    return [(record["row"], record["reference"]) for record in records]


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
