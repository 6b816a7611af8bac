"""eval/alpaca.py calls a judge unfit that prefers a place, length or nothing."""

import re

import pytest
from alpaca_judging import QUESTIONS, RIGHT, ROWS, always_first, check_of, outputs, perfect
from conftest import load_script
from judging import ScriptedJudge, canned, entry, lines

from sftlab.judging import length_control
from sftlab.judging.judge_formats import load_format
from sftlab.judging.pairwise import rate
from sftlab.judging.sanity_checks import surely_above


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


def longer(question, a, b):
    return f"By length. [RESULT] {'A' if len(a) >= len(b) else 'B'}"


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
    assert check_of(report, "good over shuffled")["value"] == 1
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
    assert check_of(report, "same answer twice")["value"] == 0.5
    assert check_of(report, "same answer twice")["note"] == "the first preferred in 100 %"
    assert check_of(report, "good over shuffled")["value"] == 0.5
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
    assert not [row["check"] for row in report["sanity_checks"] if row["passed"]]
    assert report["sanity_checks"][-1]["note"] == "no judgement could be read"
    sick = ScriptedJudge(lambda q, a, b: "Error: overloaded")
    sick.facts = sick.facts | {"server": "http://localhost:1/v1"}
    with pytest.raises(SystemExit, match=r"is no judgement is asked again by the same command$"):
        evaluate(None, judge=sick)
    sick.rule = lambda q, a, b: "<think>At first sight [[A]]"  # asked again, it says the same
    with pytest.raises(SystemExit, match=r"files named above hold every judgement$"):
        evaluate(None, judge=sick)
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
    assert not check_of(report, "contradictions")["passed"]
    assert "contradiction, row 0" in capsys.readouterr().out


class ThinkingJudge(ScriptedJudge):
    """Knows the right answer, but every sixth judgement is cut off while it leans to the other."""

    def answers(self, prompts, seed=0):
        found = super().answers(prompts, seed)
        for place in range(0, len(found), 6):
            wrong = "<think>At first sight I would say [[A]] or rather [[B]], but let me check"
            found[place] = found[place]._replace(text=wrong[:45], finish="length")
        return found


def test_a_verdict_in_thinking_that_was_cut_off_does_not_count(evaluate, run, capsys):
    flags = ["--allow-unparsed"]
    report = evaluate(None, judge=ThinkingJudge(perfect), style="fastchat", flags=flags)
    tuned = report["judged"]["tuned"]
    assert tuned["cut"]["value"] > 0.1
    assert tuned["unparsed"]["value"] == tuned["cut"]["value"]
    assert tuned["wins"] == 0
    cut = [one for one in lines(run, "alpaca-judgements-*.jsonl") if "length" in one["finish"]]
    assert all(one["score"] is None for one in cut)
    printed = capsys.readouterr().out
    assert "were cut off at --judge_max_new_tokens: give the judge more" in printed
    assert re.search(
        r"tuned, unparsed, cut off while thinking: \d+, for instance: .*\[\[A\]\]", printed
    )


@pytest.mark.parametrize(
    ("right", "pairs", "passed"),
    [(40, 40, True), (37, 40, None), (93, 100, True), (20, 40, False), (5, 5, None), (0, 0, False)],
)
def test_good_over_shuffled_passes_where_the_whole_interval_is_above(right, pairs, passed):
    row = rate(right, pairs)
    found = surely_above(row, pairs)
    assert found["passed"] is passed
    if (right, pairs) == (37, 40):
        assert found["note"] == "too few of 40 pairs, it takes about 88 (--sanity_checks)"


def test_a_check_that_is_left_open_is_said_on_top(evaluate, capsys):
    report = evaluate(perfect, style="fastchat", flags=["--sanity_checks", "5"])
    assert check_of(report, "good over shuffled")["passed"] is None
    printed = capsys.readouterr().out
    assert "warning: the judge is not shown to be fit, too few pairs: good over" in printed
    assert "the judge is not shown to be fit\n" in printed
