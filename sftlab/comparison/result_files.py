"""What eval/ wrote beside a run, read with a check of every value that a report uses."""

import json
import math
from pathlib import Path
from typing import Any

from sftlab.evaluation.entries import read_entries
from sftlab.evaluation.text_metrics import NAMES
from sftlab.runs.run_directory import SIDES
from sftlab.schema import (
    BOOLEAN,
    COUNT,
    NUMBER,
    OBJECT,
    TEXT,
    Kind,
    check,
    list_of,
    read_content,
    read_object,
)


def _is_estimate(value: Any) -> bool:
    ends = value.get("interval_95") if isinstance(value, dict) else None
    return (
        NUMBER.holds(value.get("value") if isinstance(value, dict) else None)
        and list_of(NUMBER.or_null()).holds(ends)  # the rows may not tell an end
        and len(ends) == 2
    )


_ESTIMATE = Kind("a value and an interval_95", _is_estimate)
_SCORE = Kind(
    "base and tuned, each with value and interval_95",
    lambda value: isinstance(value, dict) and all(_is_estimate(value.get(x)) for x in SIDES),
)
_NUMBERS = list_of(Kind("a number", lambda value: NUMBER.holds(value) and math.isfinite(value)))
_ADAPTER = {"adapter_hash": TEXT.or_null()}
_QUALITY = _ADAPTER | dict.fromkeys(("scores", "versions", "hardware"), OBJECT)
_QUALITY |= {
    "rows": COUNT,
    "generation.temperature": NUMBER,
    "held_out.fingerprint": TEXT.or_null(),
}
_QUALITY |= {"bleu": TEXT, "rouge": TEXT}
_OF_QUALITY = {f"scores.{name}": _SCORE.or_null() for name in NAMES}
_TASK = _ADAPTER | {
    "task": TEXT,
    "chat_template": BOOLEAN,
    "limit": COUNT.or_null(),
    "few_shot": COUNT,
    "main_metric": TEXT,
    "metrics": OBJECT,
}
_PREFERENCES = _ADAPTER | {"scores": OBJECT, "models": list_of(TEXT), "pairs": COUNT}
_PREFERENCES |= {"held_out.dataset": TEXT}
_OF_TEXT = _ADAPTER | {"scores.text_perplexity": _SCORE, "held_out.dataset": TEXT}
_JUDGED = _ADAPTER | {"title": TEXT, "judge_fit": BOOLEAN, "scores": OBJECT}
_JUDGED |= {"judge": OBJECT, "generation": OBJECT, "questions_hash": TEXT}
_JUDGED |= {f"{part}.tuned.hash": TEXT for part in ("answers", "judged")}
_OF_JUDGED = {"scores.win_rate": _SCORE, "scores.overall": _SCORE}
_RECORD = {"row": COUNT, "reference": TEXT, "tuned.text": TEXT}
_RECORD |= {f"tuned.{part}": _NUMBERS for part in ("response_nll", "text_nll", "bleu_counts")}


def read_quality(path: Path) -> dict[str, Any]:
    """Returns quality.json, {} without one. Raises ValueError for another form."""
    if not path.exists():
        return {}
    quality = read_object(path)
    if quality:
        check(quality, str(path), _QUALITY, _OF_QUALITY)
    return quality


def check_differences(path: Path, quality: dict[str, Any]) -> None:
    """Raise ValueError where scores of quality.json lack what a model card shows of them."""
    for name in NAMES:
        if score := quality["scores"].get(name):
            where = f"{path}, scores.{name}"
            check(score, where, {"difference": _ESTIMATE, "p_holm": NUMBER})
    check(quality, str(path), {"held_out.dataset": TEXT})


def read_records(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of quality.jsonl. Raises ValueError for the first of another form."""
    records = []
    try:
        lines = read_content(path).decode("utf-8").split("\n")
    except ValueError as error:
        raise ValueError(f"{path} is not what quality.json was made from: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is not what quality.json was made from: line {number}: {error}"
            ) from error
        if not isinstance(record, dict):
            raise ValueError(f"{where} is no object: expected what eval/quality.py writes")
        check(record, where, _RECORD)
        records.append(record)
    return records


def read_tasks(path: Path) -> list[dict[str, Any]]:
    """Returns the entries of harness.json. Raises ValueError for another form."""
    entries = read_entries(path, ())
    for number, entry in enumerate(entries):
        where = f"{path}, entries[{number}]"
        check(entry, where, _TASK)
        if not _SCORE.holds(entry["metrics"].get(entry["main_metric"])):
            raise ValueError(f"{where}: metrics.{entry['main_metric']}: expected {_SCORE.name}")
    return entries


def read_text_scores(folder: Path) -> list[dict[str, Any]]:
    """Returns each perplexity*.json in a folder. Raises ValueError for another form."""
    found = []
    for path in sorted(folder.glob("perplexity*.json")):
        found.append(read_object(path))
        check(found[-1], str(path), _OF_TEXT)
    return found


def read_preferences(path: Path) -> dict[str, Any]:
    """Returns preferences.json, {} without one. Raises ValueError for another form."""
    if not path.exists():
        return {}
    found = read_object(path)
    check(found, str(path), _PREFERENCES)
    for name in found["scores"]:
        where = f"{path}, scores.{name}"
        check(found["scores"], where, {name: OBJECT})
        sides = dict.fromkeys((*found["models"], "difference"), _ESTIMATE)
        check(found["scores"][name], where, {"tuned": _ESTIMATE, "p_holm": NUMBER}, sides)
    return found


def read_judged(path: Path) -> list[dict[str, Any]]:
    """Returns the entries of alpaca.json or mt_bench.json. Raises ValueError for another form."""
    entries = read_entries(path, ())
    for number, entry in enumerate(entries):
        check(entry, f"{path}, entries[{number}]", _JUDGED, _OF_JUDGED)
    return entries
