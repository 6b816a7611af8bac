"""AlpacaEval's figures of finished outputs and annotations, without a run or a judge."""

from pathlib import Path
from typing import Any

from sftlab.judging.alpaca_annotators import ALPACA_EVAL_2, is_preference, official
from sftlab.judging.alpaca_files import (
    Outputs,
    is_alpaca_eval,
    read_json_list,
    read_outputs,
    refuse_twice,
)

_COLUMNS = ("instruction", "output_1", "output_2")
_NO_CONTROL = (
    "no length-controlled rate: it needs all of AlpacaEval's instructions, each with a preference, "
    f"the judge {ALPACA_EVAL_2[0]} and the reference {ALPACA_EVAL_2[1]}"
)


def score_finished(outputs: Path, annotations: Path) -> dict[str, Any]:
    """Returns the leaderboard's figures of one model's outputs.

    `annotations` are alpaca-eval's: the model's output is `output_2`, and `preference` is from 1
    to 2. Win rates and errors are in per cent, `avg_length` in characters. The length-controlled
    rate comes with AlpacaEval 2's judge, reference and instructions; else `note` says why not.
    Raises ValueError where the annotations are of other outputs or hold no preference.
    """
    model, rows = read_outputs(outputs), read_json_list(annotations, _COLUMNS)
    by_instruction = {row["instruction"]: row for row in rows}
    model = _in_order_of(model, list(by_instruction))
    refuse_twice(annotations, [row["instruction"] for row in rows])
    judged = [by_instruction.get(instruction) for instruction in model.instructions]
    _refuse_others(model, outputs, judged, annotations)
    known = [row for row in judged if row and is_preference(row.get("preference"))]
    if not known:
        raise ValueError(
            f"{annotations} holds no preference from 1 to 2 of any output: annotate them again"
        )
    judge, reference, named = (
        " and ".join(sorted({str(row.get(key, "unknown")) for row in known}))
        for key in ("annotator", "generator_1", "generator_2")
    )
    # length control finds an instruction's difficulty by its row
    whole = model.published and len(known) == len(judged)
    control = whole and (judge, reference) == ALPACA_EVAL_2
    figures = official([{"annotation": row} for row in known], (model.name, reference), control)
    lengths = [len(text) for text in model.texts]
    missing, failed = judged.count(None), len(judged) - judged.count(None) - len(known)
    warnings = [f"{missing} outputs are not annotated and are left out"] * bool(missing)
    if failed:
        warnings.append(f"{failed} annotations hold no preference from 1 to 2 and are left out")
    if named not in (model.name, "unknown"):
        warnings.append(f"the annotations call the model of these outputs {named}")
    return {
        "title": "AlpacaEval 2" if control else f"instructions of {model.name}",
        "model": model.name,
        "judge": judge,
        "reference": reference,
        "warnings": warnings,
        **figures,
        **({} if control else {"note": _NO_CONTROL}),
        "avg_length": int(sum(lengths) / len(lengths)),
    }


def _in_order_of(model: Outputs, instructions: list[str]) -> Outputs:
    """Returns the outputs in AlpacaEval's own order, where `instructions` have it."""
    same = sorted(model.instructions) == sorted(instructions)
    if model.published or not same or not is_alpaca_eval(instructions):
        return model
    return model.answering(instructions, "the annotations")._replace(published=True)


def _refuse_others(
    model: Outputs, outputs: Path, judged: list[dict[str, Any] | None], annotations: Path
) -> None:
    """Raise ValueError where annotations are missing altogether or judge other answers."""
    if not any(judged):
        raise ValueError(
            f"{annotations} annotates none of the {len(judged)} instructions of {outputs}: give "
            "the annotations of these outputs"
        )
    pairs = zip(judged, model.texts, strict=True)
    other = [place for place, (row, text) in enumerate(pairs) if row and row["output_2"] != text]
    if other:
        raise ValueError(
            f"{annotations} judges other answers than those in {outputs}: output_2 differs in "
            f"{len(other)} of {len(judged)} rows, the first is row {other[0]}; give the "
            "annotations of these outputs"
        )
