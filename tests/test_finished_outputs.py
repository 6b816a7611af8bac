"""Finished outputs and annotations of them: in any order, incomplete, twice, of another model."""

import json
import random

import pytest
from conftest import SHARED, load_script, needs_shared

from sftlab.judging.alpaca_annotators import ALPACA_EVAL_2
from sftlab.judging.finished_outputs import score_finished
from sftlab.judging.length_control import alpaca_metrics, length_controlled

OUTPUTS = [
    {"instruction": f"question {i}", "output": "x" * (5 + i), "generator": "mine"}
    for i in range(12)
]
ANNOTATIONS = [
    {
        "instruction": one["instruction"],
        "output_1": "a reference",
        "generator_1": ALPACA_EVAL_2[1],
        "output_2": one["output"],
        "generator_2": "mine",
        "annotator": ALPACA_EVAL_2[0],
        "preference": 2.0 if i < 3 else 1.0,
    }
    for i, one in enumerate(OUTPUTS)
]


@pytest.fixture
def scored(tmp_path):
    """Scores outputs and annotations, which are written as files."""

    def score(outputs=OUTPUTS, annotations=ANNOTATIONS):
        for name, rows in (("outputs", outputs), ("annotations", annotations)):
            (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        return score_finished(tmp_path / "outputs.json", tmp_path / "annotations.json")

    return score


def changed(rows, place, **fields):
    return [row | fields if i == place else row for i, row in enumerate(rows)]


def test_the_order_of_outputs_does_not_matter(scored):
    found = scored(random.Random(0).sample(OUTPUTS, 12))
    assert found == scored()
    assert (found["win_rate"], found["n_total"], found["warnings"]) == (25, 12, [])
    assert "no length-controlled rate: it needs all of AlpacaEval's instructions" in found["note"]


def test_what_is_left_out_is_said(scored):
    assert scored(OUTPUTS[:10])["n_total"] == 10
    found = scored(annotations=changed(ANNOTATIONS, 0, preference=None)[:10])
    assert found["n_total"] == 9
    assert found["warnings"] == [
        "2 outputs are not annotated and are left out",
        "1 annotations hold no preference from 1 to 2 and are left out",
    ]
    found = scored(annotations=[row | {"generator_2": "theirs"} for row in ANNOTATIONS])
    assert found["warnings"] == ["the annotations call the model of these outputs theirs"]
    assert scored(annotations=changed(ANNOTATIONS, 0, annotator="a"))["judge"] == (
        f"a and {ALPACA_EVAL_2[0]}"
    )


@pytest.mark.parametrize("preference", [None, "1.2", 7, "missing"])
def test_annotations_without_any_preference_are_refused(scored, preference):
    rows = [{k: v for k, v in row.items() if k != "preference"} for row in ANNOTATIONS]
    if preference != "missing":
        rows = [row | {"preference": preference} for row in rows]
    with pytest.raises(ValueError, match=r"annotations.json holds no preference from 1 to 2"):
        scored(annotations=rows)


@pytest.mark.parametrize(
    ("outputs", "annotations", "message"),
    [
        ([*OUTPUTS, OUTPUTS[0]], ANNOTATIONS, r"outputs.json has .*'question 0' twice, in rows 0"),
        (OUTPUTS, [*ANNOTATIONS, ANNOTATIONS[3]], r"annotations.json has .* in rows 3 and 12"),
        (
            changed(OUTPUTS, 2, output="?"),
            ANNOTATIONS,
            "output_2 differs in 1 of 12 rows, .* row 2",
        ),
        ([{"instruction": "else", "output": "x"}], ANNOTATIONS, "annotates none of the 1"),
        (ANNOTATIONS, ANNOTATIONS, r"outputs.json is no list of objects with .* output,"),
        (OUTPUTS, OUTPUTS, r"annotations.json is no list of objects with .* output_1, output_2"),
    ],
)
def test_files_that_do_not_belong_together_are_refused_by_name(
    scored, outputs, annotations, message
):
    with pytest.raises(ValueError, match=message):
        scored(outputs, annotations)


def test_a_wrong_first_file_is_called_by_its_own_name(tmp_path):
    (tmp_path / "wrong.json").write_text("[]")
    with pytest.raises(ValueError, match=r"wrong\.json") as error:
        load_script("eval/alpaca.py").main(
            ["--outputs", str(tmp_path / "wrong.json"), "--annotations", str(tmp_path / "a.json")]
        )
    assert "reference" not in str(error.value)


@needs_shared
def test_published_outputs_in_another_order_have_their_length_control(scored, monkeypatch):
    folder = SHARED / "alpaca_eval"
    monkeypatch.setattr(
        alpaca_metrics(), "hf_hub_download", lambda **_: folder / "df_gamed_standin.csv"
    )
    outputs, annotations = (
        json.loads((folder / "alpaca-7b" / f"{name}.json").read_text())
        for name in ("model_outputs", "annotations")
    )
    found = scored(random.Random(0).sample(outputs, 805), annotations)
    assert found["title"] == "AlpacaEval 2"
    assert found["length_controlled_winrate"] == pytest.approx(5.875, abs=0.15)
    assert "length_controlled_winrate" not in scored(
        outputs, changed(annotations, 0, preference=None)
    )


@needs_shared
def test_equal_length_is_withheld_where_22_of_805_reach_it():
    path = SHARED / "alpaca_eval" / "alpaca-7b" / "annotations.json"
    rows = json.loads(path.read_text())
    scores = [{True: 1.0, False: 0.0}[row["preference"] > 1.5] for row in rows]
    answers, references = ([row[key] for row in rows] for key in ("output_2", "output_1"))
    found = length_controlled({"tuned": scores}, {"tuned": answers}, references)
    assert found == {"tuned": {"rests_on": 22, "rows": 805}}
