"""Published annotations give the published win rates and length-controlled rates."""

import json
import re

import numpy as np
import pandas
import pytest
from conftest import SHARED, load_script, needs_shared
from judging import longer_output, no_hub

from sftlab.judging.alpaca_annotators import Annotators, forget_missing, official
from sftlab.judging.alpaca_files import read_outputs, read_preferences
from sftlab.judging.length_control import alpaca_metrics, length_controlled
from sftlab.judging.pairwise import Pair, tally


def test_preferences_of_neither_kind_are_left_out(tmp_path):
    path = tmp_path / "annotations.json"
    texts = {"instruction": "i", "output_1": "a", "output_2": "b"}

    def read(*preferences):
        path.write_text(json.dumps([texts | {"preference": one} for one in preferences]))
        return read_preferences(path)[1]

    assert read(1, 2, 1.5, 0, None, float("nan"), 1.9) == [False, True, True]
    with pytest.raises(ValueError, match="prefers neither answer anywhere"):
        read(1.5, None)


ANNOTATIONS = SHARED / "alpaca_eval" / "alpaca-7b" / "annotations.json"


@needs_shared
def test_the_public_annotations_give_the_published_figures(monkeypatch):
    """alpaca-eval's own metrics on the leaderboard's annotations of alpaca-7b, length control
    offline.
    """
    folder = SHARED / "alpaca_eval"
    glm = alpaca_metrics()
    monkeypatch.setattr(glm, "hf_hub_download", lambda **_: folder / "df_gamed_standin.csv")
    rows = json.loads(ANNOTATIONS.read_text())
    found = official(
        [{"annotation": row} for row in rows], ("alpaca-7b", "gpt4_1106_preview"), control=True
    )
    assert found["n_total"] == 805
    assert found["win_rate"] == pytest.approx(2.591450540223603, abs=1e-6)
    assert found["standard_error"] == pytest.approx(0.4870855382635108, abs=1e-6)
    assert found["length_controlled_winrate"] == pytest.approx(5.875487163278986, abs=0.15)
    table = (
        pandas.read_csv(folder / "df_gamed_standin.csv").drop_duplicates("index").set_index("index")
    )
    monkeypatch.setattr(
        glm, "_get_instructions_difficulty", lambda: table["instruction_difficulty"]
    )
    weights = pandas.read_csv(folder / "glm_weights.csv", index_col=0)
    published = 100 * glm.predict_winrate("alpaca-7b", "gpt4_1106_preview", weights=weights)
    assert published == pytest.approx(5.875487163278986, abs=1e-4)


@needs_shared
def test_the_published_files_are_read():
    outputs = read_outputs(SHARED / "alpaca_eval" / "gpt4_1106_preview" / "model_outputs.json")
    assert (outputs.name, len(outputs.texts), outputs.published) == ("gpt4_1106_preview", 805, True)
    assert not outputs.first(804)._replace(published=False).published
    pairs, preferred, whose = read_preferences(ANNOTATIONS)
    assert whose == "weighted_alpaca_eval_gpt4_turbo"
    assert len(pairs) == len(preferred) == 802
    assert sum(preferred) == 17


def test_without_the_hubs_file_the_official_rate_has_no_length_control(monkeypatch):
    monkeypatch.setattr(alpaca_metrics(), "hf_hub_download", no_hub)
    rows = [
        {
            "instruction": f"q{i}",
            "output_1": "a",
            "output_2": "bb",
            "preference": 1.0 + (i % 4 == 0),
        }
        for i in range(40)
    ]
    found = official(
        [{"annotation": row} for row in rows], ("m", "gpt4_1106_preview"), control=True
    )
    assert found["win_rate"] == 25
    assert "df_gamed.csv is not in the hub's cache" in found["note"]


def test_annotators_of_alpaca_eval_see_both_orders_and_are_not_asked_twice(monkeypatch, tmp_path):
    """The config's own prompt and parser.

    In place of the API a model that prefers the longer output, by 9 to 1.
    """
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    asked = []

    def completions(prompts, **_):
        asked.extend(prompts)
        return longer_output(prompts)

    monkeypatch.setattr("alpaca_eval.decoders.openai.openai_completions", completions)
    pairs = [Pair(i, f"question {i}", "x" * (30 if i < 5 else 3), "y" * 10) for i in range(8)]
    records = Annotators("weighted_alpaca_eval_gpt4_turbo", tmp_path).judged(pairs, "judging")
    assert [one["score"] for one in records] == [1] * 5 + [0] * 3
    assert len(asked) == 16
    assert tally(records)["first_preferred"]["value"] is None
    first = [asked[i].index("xxx") < asked[i].index("yyy") for i in range(16)]
    assert sum(first) == 8
    own = [one["annotation"]["preference"] for one in records]
    assert own == pytest.approx([1.9] * 5 + [1.1] * 3)
    found = official(records, ("tuned", "gpt4_1106_preview"), control=False)
    assert found["win_rate"] == pytest.approx(100 * (5 * 0.9 + 3 * 0.1) / 8)
    again = Annotators("weighted_alpaca_eval_gpt4_turbo", tmp_path).judged(pairs, "judging")
    assert [one["score"] for one in again] == [one["score"] for one in records]
    assert len(asked) == 16


def test_length_control_finds_the_rate_at_equal_length(monkeypatch):
    monkeypatch.setattr("sftlab.judging.length_control.RESAMPLES", 30)
    rng = np.random.default_rng(0)
    references, answers, scores = ["y" * int(n) for n in rng.integers(100, 2000, 800)], {}, {}
    for side, intercept in (("base", 0.0), ("tuned", 1.0)):
        answers[side] = ["x" * int(n) for n in rng.integers(600, 4000, 800)]
        apart = np.array([len(a) - len(b) for a, b in zip(answers[side], references, strict=True)])
        chance = 1 / (1 + np.exp(-(intercept + 3 * np.tanh(apart / apart.std()))))
        scores[side] = (rng.random(800) < chance).astype(float).tolist()
        assert np.mean(scores[side]) > 0.7
    found = length_controlled(scores, answers, references)
    for side, truth in (("base", 50), ("tuned", 73.1)):
        low, high = found[side]["interval_95"]
        assert low < truth < high
        assert found[side]["value"] == pytest.approx(truth, abs=4)
    assert found["difference"]["value"] == pytest.approx(
        found["tuned"]["value"] - found["base"]["value"]
    )
    assert (
        length_controlled(
            {"tuned": scores["tuned"][:10]}, {"tuned": answers["tuned"][:10]}, references[:10]
        )
        is None
    )
    few = {"tuned": [1.0] * 9 + [0.0] * 791}
    assert length_controlled(few, {"tuned": answers["tuned"]}, references) is None, (
        "too few are won"
    )


def test_the_rate_at_equal_length_is_the_raw_one_where_length_does_not_matter(monkeypatch):
    monkeypatch.setattr("sftlab.judging.length_control.RESAMPLES", 60)
    rng = np.random.default_rng(0)
    answers, references = (["x" * int(n) for n in rng.integers(100, 1000, 200)] for _ in range(2))
    scores = (rng.random(200) < 0.55).astype(float)
    found = length_controlled({"tuned": scores.tolist()}, {"tuned": answers}, references)["tuned"]
    assert found["value"] == pytest.approx(100 * scores.mean(), abs=1.5)
    low, high = found["interval_95"]
    assert 8 < high - low < 20


@needs_shared
def test_finished_outputs_are_scored_without_a_run(monkeypatch, capsys, tmp_path):
    """One command gives the leaderboard's figures, and refuses the annotations of other outputs."""
    folder = SHARED / "alpaca_eval"
    monkeypatch.setattr(
        alpaca_metrics(), "hf_hub_download", lambda **_: folder / "df_gamed_standin.csv"
    )
    alpaca = load_script("eval/alpaca.py")
    outputs, finished = folder / "alpaca-7b" / "model_outputs.json", "--annotations"
    alpaca.main(["--outputs", str(outputs), finished, str(ANNOTATIONS)])
    printed = " ".join(capsys.readouterr().out.split())
    assert "AlpacaEval 2: alpaca-7b, judge weighted_alpaca_eval_gpt4_turbo" in printed
    assert "win_rate 2.591 standard_error 0.4871" in printed
    assert re.search(r"n_total 805 .* length_controlled_winrate 5\.[89]", printed)
    assert printed.endswith("avg_length 396")
    other = folder / "gpt4_1106_preview" / "model_outputs.json"
    with pytest.raises(
        ValueError, match=r"judges other answers than those in .*: output_2 differs"
    ):
        alpaca.main(["--outputs", str(other), finished, str(ANNOTATIONS)])
    with pytest.raises(ValueError, match="expected --outputs and --annotations together"):
        alpaca.main(["--outputs", str(other)])


def test_annotations_that_failed_are_left_out_and_asked_again(tmp_path):
    texts = {"instruction": "i", "output_1": "a", "output_2": "bb"}
    rows = [texts | {"preference": one} for one in (1.2, None, 2.0, float("nan"))]
    found = official([{"annotation": row} for row in rows], ("m", "r"), control=False)
    assert (found["n_total"], found["n_wins"]) == (2, 1)
    kept = tmp_path / "annotations.json"
    kept.write_text(json.dumps([texts | {"preference": one} for one in (1.2, None, -1, 2.0)]))
    forget_missing(kept)
    assert [row["preference"] for row in json.loads(kept.read_text())] == [1.2, 2.0]


def test_equal_length_is_withheld_where_no_answer_reaches_it(monkeypatch):
    monkeypatch.setattr("sftlab.judging.length_control.RESAMPLES", 20)
    rng = np.random.default_rng(0)
    references = ["x" * 100] * 400
    answers = ["x" * int(n) for n in rng.integers(10, 90, 400)]
    answers[:15] = ["x" * 120] * 15
    scores = rng.integers(0, 2, 400).astype(float).tolist()
    found = length_controlled({"tuned": scores}, {"tuned": answers}, references)["tuned"]
    assert found == {"rests_on": 15, "rows": 400}
    answers[:30] = ["x" * 120] * 30
    found = length_controlled({"tuned": scores}, {"tuned": answers}, references)["tuned"]
    assert (found["rests_on"], 0 < found["value"] < 100) == (30, True)
