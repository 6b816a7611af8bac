"""AlpacaEval's figures of finished outputs and annotations, without a run or a judge."""

from pathlib import Path
from typing import Any

from sftlab.judging.alpaca_annotators import ALPACA_EVAL_2, official
from sftlab.judging.alpaca_files import Outputs, read_json_list, read_outputs

_COLUMNS = ("instruction", "output_1", "output_2")


def score_finished(outputs: Path, annotations: Path) -> dict[str, Any]:
    """Returns the leaderboard's figures of one model's outputs.

    `annotations` are alpaca-eval's: the model's output is `output_2`, and `preference` is from 1
    to 2. Win rates and errors are in per cent, `avg_length` in characters. The length-controlled
    rate comes with AlpacaEval 2's judge, reference and instructions. Raises ValueError where the
    annotations are of other outputs.
    """
    model = read_outputs(outputs)
    rows = read_json_list(annotations, _COLUMNS)
    by_instruction = {row["instruction"]: row for row in rows}
    judged = [by_instruction.get(instruction) for instruction in model.instructions]
    _refuse_others(model, outputs, judged, annotations)
    names = {key: {row.get(key) for row in judged if row} for key in ("annotator", "generator_1")}
    judge, reference = (
        str(values.pop()) if len(values) == 1 else "unknown" for values in names.values()
    )
    # length control finds an instruction's difficulty by its row
    control = model.published and all(judged) and (judge, reference) == ALPACA_EVAL_2
    known = [{"annotation": row} for row in judged if row]
    figures = official(known, (model.name, reference), control)
    lengths = [len(text) for text in model.texts]
    return {
        "title": "AlpacaEval 2" if control else f"instructions of {model.name}",
        "model": model.name,
        "judge": judge,
        "reference": reference,
        "not_annotated": judged.count(None),
        **figures,
        "avg_length": int(sum(lengths) / len(lengths)),
    }


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
