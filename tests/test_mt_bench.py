"""eval/mt_bench.py as a user types it:

both turns, the judge's own scale, references, sanity checks, plots, mistakes.
"""

import json
import subprocess
from pathlib import Path

import fork_server
import pytest
from conftest import ROOT, SHARED, load_script, needs_shared
from judging import ScriptedJudge, canned, entry, lines

from sftlab.evaluation.generation import Sampling
from sftlab.judging.judge_formats import load_format
from sftlab.judging.model_answers import Contestants
from sftlab.judging.ratings import noise_floor, read_questions

CATEGORIES = ["writing", "stem", "math", "coding"]


@pytest.fixture(scope="module")
def mt_bench():
    return load_script("eval/mt_bench.py")


def texts(number):
    return [f"Question {number}, turn {turn}?" for turn in (1, 2)]


@pytest.fixture
def files(tmp_path):
    """40 questions of four categories; math and coding have reference answers."""
    questions = [
        {"question_id": 81 + i, "category": CATEGORIES[i // 10], "turns": texts(81 + i)}
        for i in range(40)
    ]
    right = [
        {
            "question_id": 81 + i,
            "choices": [{"turns": [f"right {81 + i} {turn}" for turn in (1, 2)]}],
        }
        for i in range(20, 40)
    ]
    found = []
    for name, rows in (("question.jsonl", questions), ("reference.jsonl", right)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        found.append(str(tmp_path / name))
    return ["--questions", found[0], "--references", found[1]]


@pytest.fixture
def evaluate(mt_bench, run, files, monkeypatch):
    """Evaluates canned answers:

    base is `poor`, tuned `good` in the first turn and poor in the second.
    """

    def build(rule, style="fastchat", flags=(), judge=None):
        said = {side: {} for side in ("base", "tuned")}
        for number in range(81, 121):
            first, second = texts(number)
            said["base"] |= {first: f"poor base {number}", second: f"poor base again {number}"}
            said["tuned"] |= {first: f"good tuned {number}", second: f"poor tuned {number}"}
        canned(monkeypatch, said["base"], said["tuned"])
        judge = judge or ScriptedJudge(rule)
        monkeypatch.setattr(mt_bench, "judge_from", lambda _: (judge, load_format(style)))
        mt_bench.main(["--run", str(run), "--judge", "scripted", *files, *flags])
        return entry(run, "mt_bench")

    return build


def last_answer(prompt):
    """What a FastChat or Prometheus prompt asks to be rated."""
    for head, foot in (
        ("### Assistant A:\n", "\n\n<|The End of Assistant A's"),
        ("[The Start of Assistant's Answer]\n", "\n[The End of"),
        ("###Response to evaluate:\n", "\n\n###"),
    ):
        if head in prompt:
            return prompt.rpartition(head)[2].partition(foot)[0]
    raise AssertionError(prompt)


def question_number(prompt):
    return int(prompt.rpartition("Question ")[2].partition(",")[0])


def rates(prompt, scale):
    """A judge that knows good answers, and right ones by the number of the question.

    Texts in the judge's format.
    """
    text = last_answer(prompt)
    good = (
        text == f"right {question_number(prompt)} 1" if text.startswith("right") else "good" in text
    )
    return ("[[9]]" if good else "[[3]]") if scale == 10 else f"[RESULT] {5 if good else 2}"


def test_means_by_turn_and_category_on_the_general_scale(evaluate, run, capsys):
    report = evaluate(lambda prompt: rates(prompt, 10))
    assert report["judge_fit"]
    assert report["title"] == "MT-Bench, judge scripted, scale 1 to 10"
    scores = report["scores"]
    assert list(scores) == ["overall", "turn 1", "turn 2", *CATEGORIES]
    assert [scores[name]["tuned"]["value"] for name in scores] == [6, 9, 3, 6, 6, 6, 6]
    assert all(one["base"]["value"] == 3 for one in scores.values())
    assert scores["overall"]["difference"]["value"] == 3
    assert scores["turn 2"]["p_holm"] == 1
    assert scores["overall"]["p_holm"] == scores["overall"]["p_value"]
    assert scores[CATEGORIES[0]]["p_holm"] > scores[CATEGORIES[0]]["p_value"]
    records = lines(run, "mt_bench-judgements-*.jsonl")
    assert len(records) == 2 * 2 * 40
    for record in records:
        shown = record["prompt"][-1]["content"]
        assert ("right" in shown) is (record["category"] in ("math", "coding"))
        if record["turn"] == 2:
            first, second = record["answers"]
            assert shown.index(first) < shown.index(second)
            assert texts(record["question_id"])[0] in shown
    for name in ("radar", "bars"):
        assert (
            run / "eval" / next(f for f in report["files"] if name in f and f.endswith("png"))
        ).stat().st_size > 10_000
    printed = capsys.readouterr().out
    few = "warning: categories have as few as 10 questions: their intervals are wide, and rare"
    assert printed.index(few) < printed.index("sanity check") < printed.index("mean rating")


def test_prometheus_stays_on_its_own_scale(evaluate):
    report = evaluate(lambda prompt: rates(prompt, 5), style="prometheus")
    assert report["title"].endswith("scale 1 to 5")
    assert report["scores"]["turn 1"]["tuned"]["value"] == 5
    assert report["scores"]["turn 1"]["base"]["value"] == 2
    assert report["judge_fit"]


def test_one_rating_for_everything_is_unfit(evaluate, capsys):
    report = evaluate(lambda prompt: "Rating: [[7]]")
    assert not report["judge_fit"]
    (row,) = (row for row in report["sanity_checks"] if row["check"] == "right over shuffled")
    assert row["value"] == 0.5
    assert row["note"] == "20 rated alike"
    assert "mean rating (UNFIT judge)" in capsys.readouterr().out


def test_ratings_that_contradict_the_judges_words_fail_the_judge(evaluate, capsys):
    report = evaluate(lambda prompt: "The response is completely wrong. Rating: [[9]]")
    (row,) = (row for row in report["sanity_checks"] if row["check"] == "contradictions")
    assert (row["value"], row["passed"], report["judge_fit"]) == (1, False, False)
    assert "contradictions" in capsys.readouterr().out.partition("UNFIT, it failed: ")[2]


def forget(run):
    """Let the judge be asked again."""
    for path in (run / "eval").glob("verdicts-*.jsonl"):
        path.unlink()


@pytest.mark.parametrize(("higher", "passed"), [(0.0, True), (2.0, False), (None, False)])
def test_one_model_rated_above_itself_fails_the_judge(higher, passed):
    ratings = [float(1 + i % 5) for i in range(30)]
    one = [{"rating": None if higher is None else rating + higher} for rating in ratings]
    row = noise_floor(one, [{"rating": rating} for rating in reversed(ratings)], (1, 10))
    assert row["passed"] is passed


def test_unparsed_ratings_are_left_out_and_many_are_refused(evaluate, run):
    def sometimes(prompt):
        return "It deserves a 7." if last_answer(prompt) == "good tuned 81" else rates(prompt, 10)

    report = evaluate(sometimes)
    assert report["judged"]["tuned"]["unparsed"]["value"] == 1 / 80
    assert report["scores"]["turn 1"]["tuned"]["value"] == 9
    assert any(
        warning.startswith("1.25 % of the judgements of tuned") for warning in report["warnings"]
    )
    forget(run)
    with pytest.raises(SystemExit, match="more than 5 % of the judgements hold no rating"):
        evaluate(
            lambda prompt: (
                "It deserves a 7." if "tuned" in last_answer(prompt) else rates(prompt, 10)
            )
        )
    assert entry(run, "mt_bench")["scores"] == {}
    assert (
        evaluate(None, flags=["--allow-unparsed"])["scores"] == {}
    )  # no rating of tuned in any group
    forget(run)
    assert evaluate(lambda prompt: "7", flags=["--allow-unparsed"])["scores"] == {}


def test_scoring_again_asks_nothing(evaluate):
    first = evaluate(lambda prompt: rates(prompt, 10))
    judge = ScriptedJudge(None)
    assert evaluate(None, judge=judge)["scores"] == first["scores"]
    assert judge.asked == []


def test_answers_follow_the_categories_temperature_and_the_real_history(
    mt_bench, untrained, files, monkeypatch
):
    seen = []

    def answers(self, side, conversations, sampling, title):
        seen.extend((sampling.temperature, conversation) for conversation in conversations)
        return [mt_bench.Answer(f"to {c[-1]['content']}", 3, "stop", False) for c in conversations]

    monkeypatch.setattr(Contestants, "answers", answers)
    questions = read_questions(Path(files[1]), Path(files[3]))
    found = mt_bench.both_turns(object.__new__(Contestants), "base", questions, Sampling(8))
    assert [len(one) for one in found] == [2] * 40
    assert {0.7, 0.1, 0.0} == {temperature for temperature, _ in seen}
    assert [len(conversation) for _, conversation in seen] == [1] * 40 + [3] * 40
    for temperature, conversation in seen:
        number = question_number(conversation[-1]["content"])
        assert temperature == [0.7, 0.1, 0.0, 0.0][(number - 81) // 10]
        if len(conversation) == 3:
            assert conversation[1] == {"role": "assistant", "content": f"to {texts(number)[0]}"}
    assert found[3][1].text == f"to {texts(84)[1]}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--questions", "nothing.jsonl"], "no file 'nothing.jsonl': MT-Bench's question.jsonl"),
        (["--limit", "-1"], "--limit of 0"),
        (["--judge", ""], "expected --judge"),
    ],
)
def test_mistakes_are_one_sentence(mt_bench, run, files, change, message):
    with pytest.raises(SystemExit) as stopped:
        mt_bench.main(["--run", str(run), "--judge", "x", *files, *change])
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)


@needs_shared
def test_the_real_questions_are_read():
    folder = SHARED / "mt_bench"
    questions = read_questions(folder / "question.jsonl", folder / "reference_answer_gpt-4.jsonl")
    assert len(questions) == 80
    referenced = [question.category for question in questions if question.references]
    assert {name: referenced.count(name) for name in set(referenced)} == {
        "math": 10,
        "reasoning": 10,
        "coding": 10,
    }


def test_small_models_from_answers_to_report_with_a_random_judge(run, files, base, tmp_path):
    """The whole path on real (tiny) models, twice:

    a random judge is named unfit, and nothing is done again.
    """
    judge = tmp_path / "judge"
    judge.mkdir()
    for path in [
        *base.iterdir(),
        *(run / "adapter").glob("tokenizer*"),
        *(run / "adapter").glob("chat_template*"),
    ]:
        (judge / path.name).write_bytes(path.read_bytes())
    config = json.loads((judge / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (judge / "config.json").write_text(json.dumps(config))
    outputs = tmp_path / "outputs.json"
    rows = [
        {"instruction": text, "output": f"right {i}"} for i in range(8) for text in texts(i)[:1]
    ]
    outputs.write_text(json.dumps(rows))
    short = [
        "--max_new_tokens",
        "8",
        "--judge_max_new_tokens",
        "8",
        "--run",
        str(run),
        "--judge",
        str(judge),
    ]
    for script, flags in (
        ("mt_bench", [*files, "--limit", "8", "--sanity_checks", "4", "--allow-unparsed"]),
        ("alpaca", ["--reference", str(outputs), "--allow-unparsed"]),
    ):
        command = [fork_server.python(), str(ROOT / "eval" / f"{script}.py"), *short, *flags]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "the judge is UNFIT" in done.stdout
        assert not entry(run, script)["judge_fit"]
