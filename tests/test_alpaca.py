"""eval/alpaca.py as a user types it:

scripted judges give the reports they should, and what it refuses.
"""

import json
import re

import pytest
from conftest import SHARED, load_script, needs_shared
from judging import ScriptedJudge, canned, entry, lines, longer_output, no_hub

from sftlab.evaluation.answer_file import digest
from sftlab.judging import alpaca_files as outputs_module
from sftlab.judging import length_control
from sftlab.judging.judge_formats import load_format

ROWS = 40
QUESTIONS = [f"What is the number {i} in words?" for i in range(ROWS)]
RIGHT = {text: f"It is number {i}, right." for i, text in enumerate(QUESTIONS)}


@pytest.fixture(scope="module")
def alpaca():
    return load_script("eval/alpaca.py")


def outputs(path, texts, name="good"):
    path.write_text(
        json.dumps([{"instruction": q, "output": t, "generator": name} for q, t in texts.items()])
    )
    return str(path)


@pytest.fixture
def reference(tmp_path):
    return outputs(tmp_path / "reference.json", RIGHT)


@pytest.fixture
def evaluate(alpaca, run, reference, monkeypatch):
    """Evaluates canned answers with a scripted judge.

    Answers are right in the rows named, else wrong.
    """

    def build(
        rule, base=range(10), tuned=range(25), style="prometheus", flags=(), judge=None, texts=None
    ):
        said = texts or {
            side: {
                q: RIGHT[q] if i in right else f"No idea of {i}." for i, q in enumerate(QUESTIONS)
            }
            for side, right in (("base", base), ("tuned", tuned))
        }
        canned(monkeypatch, said["base"], said["tuned"])
        judge = judge or ScriptedJudge(rule)
        monkeypatch.setattr(length_control, "RESAMPLES", 20)
        monkeypatch.setattr(alpaca, "judge_from", lambda _: (judge, load_format(style)))
        alpaca.main(["--run", str(run), "--judge", "scripted", "--reference", reference, *flags])
        return entry(run)

    return build


def always_first(question, a, b):
    return "Response A is fine. [RESULT] A"


def longer(question, a, b):
    return f"By length. [RESULT] {'A' if len(a) >= len(b) else 'B'}"


def perfect(question, a, b):
    """Knows the right answers, and calls two right or two wrong ones a tie."""
    right = [RIGHT[question] == text for text in (a, b)]
    return "[[C]]" if right[0] == right[1] else f"[[{'A' if right[0] else 'B'}]]"


def canary(report, name):
    return next(row for row in report["canaries"] if row["canary"] == name)


def test_a_perfect_judge_is_fit_and_its_win_rates_are_those_of_the_answers(evaluate, run, capsys):
    report = evaluate(perfect, style="fastchat")
    assert report["judge_fit"]
    one = report["scores"]["win_rate"]
    assert one["base"]["value"] == pytest.approx(50 * 10 / ROWS)
    assert one["tuned"]["value"] == pytest.approx(50 * 25 / ROWS)
    assert one["difference"]["value"] == pytest.approx(50 * 15 / ROWS)
    assert (
        0
        < one["difference"]["interval_95"][0]
        < one["difference"]["value"]
        < one["difference"]["interval_95"][1]
    )
    assert one["p_value"] < 0.001
    tuned = report["judged"]["tuned"]
    assert (tuned["wins"], tuned["losses"], tuned["ties"]["value"]) == (0, 15, 25 / ROWS)
    assert tuned["orders_agree"]["value"] == 1
    assert canary(report, "good over shuffled")["value"] == 1
    assert report["title"] == "instructions of good, judge scripted, reference good"
    printed = capsys.readouterr().out
    assert printed.index("good over shuffled") < printed.index("win rate, %")
    assert "the judge is fit" in printed
    assert "AlpacaEval 2" not in printed


def test_a_judge_that_always_says_a_gives_ties_and_is_unfit(evaluate, capsys):
    report = evaluate(always_first)
    assert not report["judge_fit"]
    for side in ("base", "tuned"):
        one = report["judged"][side]
        assert one["ties"]["value"] == 1
        assert one["orders_agree"]["value"] == 0
        assert one["first_preferred"]["value"] == 1
    assert report["scores"]["win_rate"]["difference"]["value"] == 0
    assert canary(report, "same answer twice")["value"] == 0.5
    assert canary(report, "same answer twice")["note"] == "the first preferred in 100 %"
    assert canary(report, "good over shuffled")["value"] == 0.5
    printed = capsys.readouterr().out
    assert "warning: the judge is UNFIT, it failed: good over shuffled" in printed
    assert "win rate, % (UNFIT judge)" in printed


def test_a_judge_that_prefers_longer_answers_is_shown_to(evaluate):
    texts = {"base": dict.fromkeys(QUESTIONS, "No.")}
    texts["tuned"] = {q: "x" * 100 if i < 30 else "No." for i, q in enumerate(QUESTIONS)}
    report = evaluate(longer, texts=texts)
    assert report["scores"]["win_rate"]["base"] == {
        "value": 0,
        "interval_95": [0, pytest.approx(8.76, abs=0.01)],
    }
    assert report["scores"]["win_rate"]["tuned"]["value"] == 75
    assert report["judged"]["tuned"]["orders_agree"]["value"] == 1
    assert report["length"]["tuned"]["longer"]["value"] == 1
    assert report["length"]["tuned"]["shorter"]["value"] == 0
    assert report["length"]["tuned"]["shorter"]["pairs"] == 10
    assert report["answers"]["tuned"]["mean_characters"] == pytest.approx(
        (30 * 100 + 10 * 3) / ROWS
    )
    assert not report["judge_fit"]


def unparsable(every):
    """A judge as good as the perfect one that gives no verdict where the instruction's number
    divides by `every`.
    """

    def rule(question, a, b):
        number = int(re.search(r"\d+", question)[0])
        return "I cannot say." if number % every == every - 1 else perfect(question, a, b)

    return rule


def test_beyond_five_per_cent_unparsed_no_win_rate_is_given(evaluate, run, capsys):
    with pytest.raises(
        SystemExit, match="10 % of the judgements hold no verdict, more than 5 %: no win rate"
    ):
        evaluate(unparsable(10), style="fastchat")
    report = entry(run)
    assert report["scores"] == {}
    assert "length" not in report
    assert report["judged"]["tuned"]["unparsed"]["value"] == 0.1
    assert not report["judge_fit"]
    assert "win rate, %" not in capsys.readouterr().out
    assert sum(record["score"] is None for record in lines(run, "alpaca-judgements-*.jsonl")) == 8

    report = evaluate(unparsable(10), style="fastchat", flags=["--allow-unparsed"])
    wrong = [i for i in range(ROWS) if i % 10 != 9]
    tuned = [0.5 if i < 25 else 0 for i in wrong]
    assert report["scores"]["win_rate"]["tuned"]["value"] == pytest.approx(
        100 * sum(tuned) / len(tuned)
    )


def test_a_judge_without_any_verdict_passes_nothing_that_asks_for_one(evaluate, run):
    with pytest.raises(SystemExit, match="100 % of the judgements hold no verdict"):
        evaluate(lambda q, a, b: "Both are fine.")
    report = entry(run)
    assert [row["canary"] for row in report["canaries"] if row["passed"]] == ["contradictions"]
    assert evaluate(None, flags=["--allow-unparsed"])["scores"] == {}


def test_between_one_and_five_per_cent_unparsed_it_is_said_on_top(evaluate, capsys):
    report = evaluate(unparsable(40), style="fastchat")
    assert report["judged"]["base"]["unparsed"]["value"] == 1 / ROWS
    assert report["judged"]["base"]["pairs_unparsed"] == 1
    assert report["judge_fit"]
    printed = capsys.readouterr().out
    assert printed.index("2.5 % of the judgements hold no verdict") < printed.index("sanity check")


def test_a_judge_that_contradicts_itself_is_listed_and_unfit(evaluate, capsys):
    report = evaluate(
        lambda q, a, b: "Response B is significantly better. It deserves a 5. [RESULT] A"
    )
    one = report["judged"]["tuned"]
    assert one["contradictions"]["value"] == 1
    assert one["contradicting_rows"] == list(range(ROWS))
    assert not canary(report, "contradictions")["passed"]
    assert "contradiction, row 0" in capsys.readouterr().out


def test_base_as_reference_is_half_by_construction(evaluate, reference, run, capsys):
    report = evaluate(
        perfect, style="fastchat", flags=["--reference", "base", "--instructions", reference]
    )
    assert report["scores"]["win_rate"]["base"] == {"value": 50.0, "interval_95": [50.0, 50.0]}
    assert report["scores"]["win_rate"]["tuned"]["value"] == pytest.approx(50 + 50 * 15 / ROWS)
    assert report["title"].endswith("judge scripted, reference base")
    assert {record["side"] for record in lines(run, "alpaca-judgements-*.jsonl")} == {"tuned"}
    assert "50 % by construction" in capsys.readouterr().out


def test_every_prompt_answer_verdict_and_judgement_is_on_disk(evaluate, run):
    evaluate(perfect, style="fastchat")
    records = lines(run, "alpaca-judgements-*.jsonl")
    assert [(record["side"], record["row"]) for record in records] == [
        (side, row) for side in ("base", "tuned") for row in range(ROWS)
    ]
    for record in records:
        first, second = (prompt[-1]["content"] for prompt in record["prompts"])
        assert first.index(record["answer"]) < first.rindex(record["reference"])
        assert second.index(record["reference"]) < second.rindex(record["answer"])
        assert [f"[[{verdict}]]" for verdict in record["verdicts"]] == record["judgements"]
    assert {"same answer twice", "good over shuffled", "base against base"} == {
        record["canary"] for record in lines(run, "alpaca-canaries-*.jsonl")
    }


def test_a_killed_evaluation_goes_on_and_scoring_again_asks_nothing(evaluate, run):
    judge = ScriptedJudge(perfect, fails_after=100)
    with pytest.raises(KeyboardInterrupt):
        evaluate(None, judge=judge, style="fastchat")
    again = ScriptedJudge(perfect)
    report = evaluate(None, judge=again, style="fastchat")
    known = {json.dumps(prompt) for prompt in judge.asked}
    assert judge.asked
    assert again.asked
    assert not known & {json.dumps(prompt) for prompt in again.asked}
    third = ScriptedJudge(perfect)
    assert evaluate(None, judge=third, style="fastchat")["scores"] == report["scores"]
    assert third.asked == []


def test_models_with_the_same_answers_stop_it(evaluate):
    with pytest.raises(SystemExit, match="base and tuned gave the same answers word for word"):
        evaluate(perfect, base=range(5), tuned=range(5), style="fastchat")


def test_empty_answers_are_judged_and_counted(evaluate, capsys):
    texts = {"base": dict.fromkeys(QUESTIONS, ""), "tuned": dict(RIGHT)}
    report = evaluate(perfect, texts=texts, style="fastchat")
    assert report["answers"]["base"]["empty"] == report["judged"]["base"]["empty_answers"] == ROWS
    assert report["scores"]["win_rate"]["base"]["value"] == 0
    assert re.search(r"empty answers +40 +0", capsys.readouterr().out)


def test_agreement_with_published_preferences(evaluate, tmp_path):
    rows = [
        {
            "instruction": q,
            "output_1": RIGHT[q] if i % 2 else "No.",
            "output_2": "No." if i % 2 else RIGHT[q],
            "preference": 1.0 if i % 2 else 2.0,
            "annotator": "gpt",
        }
        for i, q in enumerate(QUESTIONS)
    ]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(rows))
    report = evaluate(perfect, style="fastchat", flags=["--agreement", str(path)])
    row = canary(report, "agreement with gpt")
    assert (row["value"], row["passed"]) == (1, True)
    assert row["note"] == "20 of 20 where the reference won, 20 of 20 where the answer won"
    assert not any("agreement" in warning for warning in report["warnings"])
    report = evaluate(always_first, flags=["--agreement", str(path)])
    assert canary(report, "agreement with gpt")["value"] == 0.5
    assert not canary(report, "agreement with gpt")["passed"]


def test_limit_takes_the_first_and_entries_of_other_judges_stay(evaluate, run):
    report = evaluate(perfect, style="fastchat", flags=["--limit", "32"])
    assert report["rows"] == 32
    assert "first 32" in report["title"]
    evaluate(perfect, style="fastchat")
    evaluate(perfect, style="fastchat")
    assert len(json.loads((run / "eval" / "alpaca.json").read_text())["entries"]) == 2


@needs_shared
def test_the_name_alpacaeval_2_stands_for_its_judge_reference_and_instructions(
    alpaca, run, monkeypatch, capsys
):
    """The whole path with alpaca-eval's annotators.

    In place of the API a model that prefers the longer output.
    """
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setattr(length_control, "RESAMPLES", 5)
    standin = SHARED / "alpaca_eval" / "df_gamed_standin.csv"
    monkeypatch.setattr(length_control.alpaca_metrics(), "hf_hub_download", lambda **_: standin)
    monkeypatch.setattr("alpaca_eval.decoders.openai.openai_completions", longer_output)
    monkeypatch.setattr(outputs_module, "_ALPACA_EVAL", digest(QUESTIONS))
    path = outputs(run.parent / "published.json", RIGHT, "gpt4_1106_preview")
    canned(
        monkeypatch,
        dict.fromkeys(QUESTIONS, "No."),
        {q: f"{text} And more." for q, text in RIGHT.items()},
    )
    judge = ["--annotators", "weighted_alpaca_eval_gpt4_turbo", "--canaries", "4"]
    alpaca.main(["--run", str(run), "--reference", path, *judge])
    report = entry(run)
    assert (
        report["title"]
        == "AlpacaEval 2, judge weighted_alpaca_eval_gpt4_turbo, reference gpt4_1106_preview"
    )
    assert report["scores"]["win_rate"]["tuned"]["value"] == 100
    official = report["alpaca_eval"]["tuned"]
    assert official["win_rate"] == pytest.approx(90)
    assert official["n_total"] == ROWS
    assert 0 < official["length_controlled_winrate"] < 100
    assert "alpaca-eval's own metrics, tuned: win_rate 90" in capsys.readouterr().out
    for flags in (
        ["--limit", "39"],
        ["--reference", outputs(run.parent / "other.json", RIGHT, "other")],
    ):
        alpaca.main(["--run", str(run), "--reference", path, *judge, *flags])
        assert entry(run)["title"].startswith("AlpacaEval instructions, ")
        assert "length_controlled_winrate" not in entry(run)["alpaca_eval"]["tuned"]


def test_a_reference_with_other_instructions_is_refused(evaluate, tmp_path):
    other = outputs(tmp_path / "other.json", {QUESTIONS[0]: "This."}, "other")
    with pytest.raises(
        SystemExit, match="the reference other answers other instructions: 39 of 40 are not in it"
    ):
        evaluate(
            perfect,
            flags=["--reference", other, "--instructions", str(tmp_path / "reference.json")],
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--judge", "x", "--annotators", "y"], "either --judge or --annotators"),
        (
            ["--reference", "nothing.json", "--judge", "x"],
            "'nothing.json' is neither base nor a file",
        ),
        (["--reference", "gpt4_1106_preview", "--judge", "x"], "not in the hub's cache"),
        (["--annotators", "nobody"], "no annotators 'nobody': it has"),
        (["--annotators", "weighted_alpaca_eval_gpt4_turbo"], "set OPENAI_API_KEY"),
        (["--judge", "x", "--limit", "-1"], "--limit must be 0"),
        (
            ["--judge", "x", "--judge_format", "y"],
            "no judge format 'y': there are fastchat, prometheus",
        ),
        (
            ["--judge", "x", "--judge_url", "http://localhost:1/v1", "--judge_in_4bit"],
            "--judge_in_4bit is for a local",
        ),
    ],
)
def test_mistakes_are_one_sentence(alpaca, run, reference, monkeypatch, flags, message):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(outputs_module, "hf_hub_download", no_hub)
    with pytest.raises(SystemExit) as stopped:
        alpaca.main(["--run", str(run), "--reference", reference, *flags])
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_files_of_another_form_are_refused(alpaca, run, tmp_path):
    for content, message in (
        ("{", "cannot be read as JSON"),
        ("[]", "is no list"),
        ('[{"output": "x"}]', "is no list"),
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(SystemExit, match=message):
            alpaca.main(
                ["--run", str(run), "--judge", "x", "--reference", str(tmp_path / "bad.json")]
            )
