"""eval/alpaca.py --with_start: base, the model that a run went on from, and tuned in one table."""

import re

import pytest
from alpaca_judging import QUESTIONS, RIGHT, ROWS, outputs, perfect
from conftest import copy_of, load_script, read
from judging import ScriptedJudge, canned, entry, lines, prompt

from sftlab.evaluation.generation import Sampling
from sftlab.judging import length_control
from sftlab.judging.judge_formats import load_format
from sftlab.judging.model_answers import Contestants


@pytest.fixture(scope="module")
def alpaca():
    return load_script("eval/alpaca.py")


@pytest.fixture
def evaluate(alpaca, preferred, tmp_path, monkeypatch):
    """Evaluates canned answers of three models, right in the first rows, with a scripted judge."""
    reference = outputs(tmp_path / "reference.json", RIGHT)

    def build(base, start, tuned, *flags):
        said = [
            {q: RIGHT[q] if i < right else f"No idea of {i}{end}" for i, q in enumerate(QUESTIONS)}
            for right, end in ((base, "."), (start, "!"), (tuned, "?"))
        ]
        canned(monkeypatch, said[0], said[2], said[1])
        monkeypatch.setattr(length_control, "RESAMPLES", 20)
        judge = ScriptedJudge(perfect)
        monkeypatch.setattr(alpaca, "judge_from", lambda _: (judge, load_format("fastchat")))
        run = copy_of(preferred, tmp_path / "run")
        words = ["--run", str(run), "--judge", "scripted", "--reference", reference]
        alpaca.main([*words, "--with_start", *flags])
        return run, entry(run)

    return build


def test_three_models_stand_in_one_table_with_holm_over_three_claims(evaluate, capsys):
    run, report = evaluate(5, 15, 35)
    rates = {"base": 5, "start": 15, "tuned": 35}
    found = report["scores"]["win_rate"] | {"start": report["with_start"]["win_rate"]}
    for side, right in rates.items():
        assert found[side]["value"] == pytest.approx(50 * right / ROWS)
    differences = report["with_start"]["differences"]
    assert list(differences) == ["start - base", "tuned - start", "tuned - base"]
    for name, one in differences.items():
        after, before = name.split(" - ")
        assert one["value"] == pytest.approx(50 * (rates[after] - rates[before]) / ROWS)
        low, high = one["interval_95"]
        assert low < one["value"] < high
        assert one["p_holm"] >= one["p_value"]
    assert differences["start - base"]["p_holm"] > differences["start - base"]["p_value"] - 1e-12
    assert max(one["p_holm"] / one["p_value"] for one in differences.values()) == 3
    said = capsys.readouterr().out
    assert re.search(r"base +start +tuned +tuned - base", said)
    assert "p, Holm over 3" in said
    assert {record["side"] for record in lines(run, "alpaca-judgements-*.jsonl")} == set(rates)


def test_base_as_the_reference_leaves_two_to_judge(evaluate, tmp_path):
    flags = ("--reference", "base", "--instructions", str(tmp_path / "reference.json"))
    run, report = evaluate(5, 15, 35, *flags)
    sides = {record["side"] for record in lines(run, "alpaca-judgements-*.jsonl")}
    assert sides == {"start", "tuned"}
    of_start = report["with_start"]["win_rate"]["value"]
    assert of_start == pytest.approx(50 + 50 * 10 / ROWS)
    difference = report["with_start"]["differences"]["start - base"]["value"]
    assert difference == pytest.approx(of_start - 50)


def test_a_start_that_answers_as_tuned_does_stops_it(evaluate):
    with pytest.raises(SystemExit, match="start and tuned gave the same answers word for word"):
        evaluate(5, ROWS, ROWS)


def test_the_start_answers_as_the_run_that_trained_it(preferred, finished, tmp_path):
    asked = [prompt(text) for text in QUESTIONS[:6]]
    sampling = Sampling(max_new_tokens=12)
    run, sft = copy_of(preferred, tmp_path / "run"), copy_of(finished[0], tmp_path / "sft")
    contestants = Contestants(run, read(run), 4)
    contestants.add_start()
    assert contestants.sides == ("base", "start", "tuned")
    found = {side: contestants.answers(side, asked, sampling, "") for side in contestants.sides}
    alone = Contestants(sft, read(sft), 4).answers("tuned", asked, sampling, "")
    assert found["start"] == alone
    assert found["tuned"] != alone
    assert found["base"] == Contestants(sft, read(sft), 4).answers("base", asked, sampling, "")


def test_a_run_with_a_new_adapter_has_no_start(alpaca, finished, tmp_path):
    run = copy_of(finished[0], tmp_path / "run")
    reference = outputs(tmp_path / "reference.json", RIGHT)
    words = ["--run", str(run), "--judge", "x", "--reference", reference, "--with_start"]
    with pytest.raises(SystemExit, match="began with a new adapter"):
        alpaca.main(words)
