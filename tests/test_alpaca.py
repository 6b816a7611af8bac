"""eval/alpaca.py: win rates against a reference, kept judgements, and what is refused."""

import json
import re

import pytest
from alpaca_judging import QUESTIONS, RIGHT, ROWS, always_first, check_of, outputs, perfect
from conftest import SHARED, load_script, needs_shared
from judging import ScriptedJudge, canned, entry, lines, longer_output, no_hub

from sftlab.evaluation.answer_file import digest
from sftlab.judging import alpaca_files as outputs_module
from sftlab.judging import length_control
from sftlab.judging.judge_formats import load_format


@pytest.fixture(scope="module")
def alpaca():
    return load_script("eval/alpaca.py")


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
        record["check"] for record in lines(run, "alpaca-sanity_checks-*.jsonl")
    }


def test_a_killed_evaluation_goes_on_and_scoring_again_asks_nothing(evaluate, run):
    judge = ScriptedJudge(perfect, fails_after=100)
    with pytest.raises(SystemExit, match="130"):
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
    row = check_of(report, "agreement with gpt")
    assert (row["value"], row["passed"]) == (1, True)
    assert row["note"] == "20 of 20 where the reference won, 20 of 20 where the answer won"
    assert not any("agreement" in warning for warning in report["warnings"])
    report = evaluate(always_first, flags=["--agreement", str(path)])
    assert check_of(report, "agreement with gpt")["value"] == 0.5
    assert not check_of(report, "agreement with gpt")["passed"]


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
    judge = ["--annotators", "weighted_alpaca_eval_gpt4_turbo", "--sanity_checks", "4"]
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
        SystemExit,
        match=r"the reference other answers other instructions than .*json: 39 of 40 are not in it",
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
        *(
            (["--judge", "x", "--judge_url", "http://localhost:1/v1", *flags], said)
            for flags, said in (
                (["--judge_timeout", "inf"], "--judge_timeout must be above 0 and at most"),
                (["--judge_timeout", "nan"], "--judge_timeout must be above 0 and at most"),
                (["--judge_context", "-5"], "--judge_context -5 leaves no room for a prompt"),
                (["--judge_max_new_tokens", "0"], "--judge_max_new_tokens must be at least 1"),
            )
        ),
        (["--judge", "x", "--judge_url", "localhost:8000"], "expected an address such as"),
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
