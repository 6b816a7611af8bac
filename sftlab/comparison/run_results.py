"""What a run directory says of its run:

how it ended, what was measured, and the scores that are its own.
"""

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

from sftlab.evaluation.significance import compare
from sftlab.evaluation.text_metrics import NAMES, paired_scores
from sftlab.runs.run_directory import SIDES, adapter_hash, read_run

# Single losses differ from batch to batch; a run whose last tenth lies this much above its first
# has diverged.
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


class Evidence(NamedTuple):
    """A run directory: run.json, the scores that are the run's own, and digests of what it holds.

    `quality` is quality.json ({} where there is none of this adapter), `records` the lines of
    quality.jsonl, `tasks` the entries of harness.json, `judged` those of alpaca.json and
    mt_bench.json; `stale` says which scores are of another adapter and were left out.
    """

    folder: Path
    run: dict[str, Any]
    quality: dict[str, Any]
    tasks: list[dict[str, Any]]
    judged: list[dict[str, Any]]
    records: list[dict[str, Any]]
    stale: list[str]
    held: dict[str, str]


def find_runs(paths: Sequence[Path]) -> dict[str, Path]:
    """Run directories by name (run directories, or folders of them).

    ValueError where there is none.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        found = (
            [path]
            if (path / "run.json").is_file()
            else sorted(p.parent for p in path.glob("*/run.json"))
        )
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


def read_evidence(folder: Path) -> Evidence:
    """Read a run directory; ValueError names a file that cannot be read."""
    run, evaluated = _read(folder / "run.json"), folder / "eval"
    digest = adapter_hash(folder)
    held = {"adapter": digest} if digest else {}
    quality, stale = _read(evaluated / "quality.json"), []
    own: dict[str, list[dict[str, Any]]] = {}
    for name in ("harness", "alpaca", "mt_bench"):
        entries = _read(evaluated / f"{name}.json").get("entries", [])
        own[name] = [one for one in entries if one["adapter_hash"] == held.get("adapter")]
        stale += [f"stale {name} scores"] if len(own[name]) < len(entries) else []
    if quality and quality["adapter_hash"] != held.get("adapter"):
        quality, stale = {}, ["stale scores", *stale]
    try:
        lines = (
            (evaluated / "quality.jsonl").read_text(encoding="utf-8").split("\n") if quality else []
        )
        records = [json.loads(line) for line in lines if line]
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"{evaluated / 'quality.jsonl'} is not what quality.json was made of: {error}"
        ) from error
    if records:
        held["answers"] = _digest(
            json.dumps([record["tuned"]["text"] for record in records]).encode()
        )
    files = [path for path in sorted(evaluated.glob("*judg*.jsonl")) if path.stat().st_size]
    held |= {f"judgements ({path.name})": _digest(path.read_bytes()) for path in files}
    judged = own["alpaca"] + own["mt_bench"]
    for what, part in (("answers", "answers"), ("judgements", "judged")):
        held |= {f"{what} ({one['title']})": one[part]["tuned"]["hash"] for one in judged}
    return Evidence(folder, run, quality, own["harness"], judged, records, stale, held)


def outcome(run: Mapping[str, Any]) -> tuple[str, str]:
    """A run's status as a report shows it, and the reason:

    out of memory and diverged are outcomes of their own.
    """
    reason, losses = run.get("reason") or "", run.get("losses") or []
    if re.search(r"out ?of ?memory", reason, re.IGNORECASE):
        return "out of memory", reason
    for step, loss in losses:
        if not math.isfinite(loss):
            return "diverged", f"the loss is {loss} at step {step}"
    if "diverged" in reason:
        return "diverged", re.sub(r"^(\w+: )?diverged: ", "", reason)
    few = max(1, len(losses) // 10)
    first, last = (
        (sum(loss for _, loss in part) / few for part in (losses[:few], losses[-few:]))
        if losses
        else (0, 0)
    )
    if last > GROWTH * first:
        return "diverged", f"the loss grew from {first:.4g} to {last:.4g} (means of {few} logged)"
    host, process = run.get("host_pid") or (None, None)
    if (
        run["status"] == "running"
        and host == socket.gethostname()
        and not Path(f"/proc/{process}").exists()
    ):
        return "running", "its process is gone: start it again to continue"
    return run["status"], reason


def figures(one: Evidence, facts: dict[str, Any]) -> dict[str, Any]:
    """A row of the CSV: every figure as it was measured, None where it was not."""
    measured = one.run.get("measured") or {}
    peaks = measured.get("peak_memory") or [{}]
    kind = "allocated" if "allocated_gb" in peaks[0] else "resident"
    row = dict(zip(("status", "reason"), outcome(one.run), strict=True))
    row |= {key: measured.get(key, facts.get(key)) for key in (*_RAN, *_MEASURED)}
    row["lora_scale"] = " ".join(map(str, facts["lora_scale"]))
    row["peak_memory_gb"] = max((peak[f"{kind}_gb"] for peak in peaks if peak), default=None)
    row["peak_memory_is"] = kind if peaks[0] else None
    collectives = (measured.get("collectives") or {}).values()
    row["collectives"] = sum(kind["calls"] for kind in collectives) or None
    row["collectives_mb"] = round(sum(kind["mb"] for kind in collectives), 3) or None
    steps = [peak["step"] for peak in peaks if "step" in peak]
    for part in STEP_PARTS:
        row[f"step_{part}_gb"] = max((step[f"{part}_gb"] for step in steps), default=None)
    scores = {score: one.quality.get("scores", {}).get(score) for score in NAMES}
    for task in one.tasks:
        plain = "" if task["chat_template"] else " plain"
        limit = f" first {task['limit']}" if task["limit"] else ""
        scores[f"{task['task']} {task['few_shot']}-shot{plain}{limit}"] = task["metrics"][
            task["main_metric"]
        ]
    for one_judged in one.judged:
        unfit = "" if one_judged["judge_fit"] else ", UNFIT judge"
        for name, what in (("win_rate", "win rate %"), ("overall", "mean rating")):
            if name in one_judged["scores"]:
                scores[f"{what}, {one_judged['title']}{unfit}"] = one_judged["scores"][name]
    for score, found in scores.items():
        for side in SIDES:
            parts = (
                (found[side]["value"], *found[side]["interval_95"]) if found else (None, None, None)
            )
            row |= dict(
                zip(
                    (f"{side} {score}", f"{side} {score} low", f"{side} {score} high"),
                    parts,
                    strict=True,
                )
            )
    again = ["continued: figures of all starts together"] if one.run.get("interruptions") else []
    return row | {"note": "; ".join(one.stale + again)}


def about(run: Mapping[str, Any]) -> dict[str, str]:
    """Hardware, versions, and what was trained on what, for a person."""
    recipe, data, hardware = run["recipe"], run.get("data") or {}, run.get("hardware", {})
    sizes = [
        f"{name} {data[name]['rows']}" for name in ("train", "validation", "test") if name in data
    ]
    length = (
        f"{recipe['max_steps']} steps"
        if recipe["max_steps"] > 0
        else f"{recipe['num_train_epochs']:g} epochs"
    )
    return {
        "hardware": hardware.get("gpu")
        or f"{hardware.get('cpu_cores')} CPU cores, {hardware.get('machine')}",
        "versions": ", ".join(f"{name} {it}" for name, it in run.get("versions", {}).items() if it),
        "model": recipe["model_name_or_path"],
        "data": ", ".join([recipe["dataset_name"], *sizes]) + " rows" * bool(sizes),
        "training": f"{length}, global batch {recipe['global_batch_size']}, max_length {recipe['max_length']}",
    }


def twins(runs: Mapping[str, Evidence]) -> list[tuple[str, str, str]]:
    """(run, run, what) of every two runs that hold the same adapter, answers or judgements."""
    found = []
    for a, b in combinations(runs, 2):
        same = [what for what, content in runs[a].held.items() if content in runs[b].held.values()]
        found += [(a, b, ", ".join(same))] if same else []
    return found


def compare_tuned(
    runs: Mapping[str, Evidence], reference: str, scores: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Each other run's tuned `scores` against the reference's, row by row.

    And what cannot be compared, and why.

    Runs are compared on the same held-out rows alone, and in perplexity only where they cut them
    into the same tokens.
    """
    compared, left_out, first = {}, [], runs[reference].records
    for name, records in ((name, one.records) for name, one in runs.items() if name != reference):
        if [(r["row"], r["reference"]) for r in records] != [
            (r["row"], r["reference"]) for r in first
        ]:
            left_out.append(f"{name} ({'other held-out rows' if records else 'no scores'})")
            continue
        pairs = paired_scores(*([record["tuned"] for record in side] for side in (first, records)))
        likelihoods = pairs["response_perplexity"]
        alike = np.array_equal(likelihoods.base[:, 1], likelihoods.tuned[:, 1])
        left_out += [] if alike else [f"perplexity of {name} (its tokens are others)"]
        compared[name] = compare(
            {score: pairs[score] for score in scores if alike or "perplexity" not in score}
        )
    return compared, left_out


def _read(path: Path) -> dict[str, Any]:
    """run.json, or a JSON object that an evaluation wrote ({} where there is none).

    ValueError names a broken file.
    """
    try:
        content = (
            read_run(path.parent)
            if path.name == "run.json"
            else json.loads(path.read_bytes() or "{}")
        )
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or (
        path.name == "run.json" and {"status", "recipe", "launch"} - content.keys()
    ):
        raise ValueError(
            f"{path} is no record: expected an object, of a run with status, recipe and launch"
        )
    return content


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
