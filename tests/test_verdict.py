"""Judges' texts, each with its one right reading:

well-formed, without a verdict, with two, cut off, contradicting.
"""

import hashlib

import pytest

from sftlab.judging.contradictions import contradicts, praised, rating_contradicts
from sftlab.judging.judge_formats import load_format
from sftlab.judging.verdict_parsing import read

FEEDBACK = "Response A answers all 3 parts in 120 words, Response B only 2 of 5. "

RELATIVE = {
    FEEDBACK + "[RESULT] A": "A",
    FEEDBACK + "[RESULT] B": "B",
    FEEDBACK + "[RESULT] B.": "B",
    FEEDBACK + "[RESULT] (A)": "A",
    FEEDBACK + '[RESULT] "B"': "B",
    FEEDBACK + "[RESULT]: **A**": "A",
    FEEDBACK + "[RESULT] Response B": "B",
    FEEDBACK + "[RESULT] [A]": "A",
    FEEDBACK + "[result] b": "B",
    FEEDBACK + "[RESULT]\nA": "A",
    FEEDBACK + "[RESULT] 【A】。": "A",
    FEEDBACK + "[RESULT] A\n\nI hope that this helps, 5 of 5.": "A",
    "[RESULT] B": "B",
    "Antwort B ist deutlich besser als Antwort A. [RESULT] B": "B",
    "回答A更好，因为它更完整。[RESULT] A": "A",
    'As asked: "(write a feedback for criteria) [RESULT] (A or B)". '
    + FEEDBACK
    + "[RESULT] B": "B",
    FEEDBACK + "[RESULT] A\n[RESULT] A": "A",
    # no verdict, or not one
    "": None,
    FEEDBACK: None,
    "Response B is significantly better, I would give it a 5": None,
    "Response A is the better response.": None,
    FEEDBACK + "[RESULT]": None,
    FEEDBACK + "[RESULT] ": None,
    FEEDBACK + "[RES": None,
    FEEDBACK + "[RESULT] A or B": None,
    FEEDBACK + "[RESULT] (A or B)": None,
    FEEDBACK + "[RESULT] A/B": None,
    FEEDBACK + "[RESULT] Both": None,
    FEEDBACK + "[RESULT] Tie": None,
    FEEDBACK + "[RESULT] C": None,
    FEEDBACK + "[RESULT] 4": None,
    FEEDBACK + "[RESULT] A response that is complete": None,
    FEEDBACK + "[RESULT] A, because it is longer": None,
    FEEDBACK + "[RESULT] А": None,  # a Cyrillic letter
    FEEDBACK + "[RESULTAT] B": None,
    FEEDBACK + "[RESULT] A ... [RESULT] B": None,
    FEEDBACK + "[RESULT] B\nWait, no. [RESULT] A": None,
    FEEDBACK + "[RESULT] A\n[RESULT] undecided": None,
    "Result: A": None,
    "A": None,
    "[[A]]": None,
}
ABSOLUTE = {
    "Two of 5 points are missing. [RESULT] 4": 4,
    "[RESULT] 1": 1,
    "[RESULT] 5.": 5,
    "[RESULT] (3)": 3,
    "[RESULT] 4</s>": 4,
    "[RESULT] 4/5": 4,
    "[RESULT] 4 out of 5": 4,
    "[RESULT]\n2": 2,
    "So the score is 3. [RESULT] 2": 2,
    "La réponse est juste. [RESULT] 5": 5,
    "So the score is 3.": None,
    "[RESULT] 0": None,
    "[RESULT] 6": None,
    "[RESULT] 45": None,
    "[RESULT] 4.5": None,
    "[RESULT] 3-4": None,
    "[RESULT] 4/10": None,
    "[RESULT] four": None,
    "[RESULT] (an integer number between 1 and 5)": None,
    "[RESULT] 4 [RESULT] 5": None,
    "I would rate it 4 [RESULT": None,
    "Response B is significantly better ... 5": None,
    "Rating: [[4]]": None,
}
PAIR = {
    "Assistant B lists 3 more steps. [[B]]": "B",
    "My verdict: [[A]].": "A",
    "Both are right. [[C]]": "C",
    "[[ A ]]": "A",
    "[[**B**]]": "B",
    r"\[\[B\]\]": "B",
    "[[B]]</s>": "B",
    'The format is "[[A]]", "[[B]]" or "[[C]]". Assistant B is right. [[B]]': "B",
    "I choose from [[A]], [[B]] or [[C]]. Both are right. [[C]]": "C",
    "<think>Perhaps [[A]]? No.</think>\n\nAssistant B is right. [[B]]": "B",
    "so [[A]] at first</think>Assistant B is right. [[B]]": "B",
    "[THINK]I lean to [[A]].[/THINK] [[B]]": "B",
    "<|channel|>analysis<|message|>[[A]]?<|end|><|start|>assistant"
    "<|channel|>final<|message|>[[B]]": "B",
    "analysisPerhaps [[A]].assistantfinalAssistant B is right. [[B]]": "B",
    "Answer A holds a stray <think> mark. [[B]]": "B",
    "Let me see.<think>Perhaps [[A]]": None,
    "<think >[[A]]": None,
    "<scratchpad>\n[[A]]": None,
    "◁think▷Perhaps [[A]]": None,
    "◁think▷Perhaps [[A]]◁/think▷[[B]]": "B",
    "<unused94>thought\nPerhaps [[A]]": None,
    "<unused94>thought\nPerhaps [[A]]<unused95>[[B]]": "B",
    "<|channel|>analysis Perhaps [[A]]": None,
    "<|channel>thought\nPerhaps [[A]]<channel|>[[B]]": "B",
    "<|channel|>analysis<|message|>[[A]]?<|start|>assistant"
    "<|channel|>final <|constrain|>json<|message|>[[B]]": "B",
    "analysis我想 [[A]]": None,
    "【【A】】": "A",
    "［［Ｂ］］": "B",
    "I would not say [[A]].": None,
    "It is not [[A]] but [[B]]": "B",
    "<think>\nAt first sight I would say [[A]] but let me check every": None,
    "<think>[[A]]</think>": None,
    "<|channel|>analysis<|message|>I would say [[A]]": None,
    "analysisPerhaps [[A]]": None,
    "[[B]] is my final verdict, as before: [[B]]": "B",
    "Die Antworten sind gleich gut. [[C]]": "C",
    "[[A]] if I had to choose, but rather [[C]]": None,
    'I say "[[A]]" if assistant A is better, "[[B]]" if assistant B is better': None,
    "[A]": None,
    "Assistant A is better": None,
    "[[Assistant A]]": None,
    "[[D]]": None,
    "[[A": None,
}
SINGLE = {
    "It has 2 mistakes in 10 lines. Rating: [[7]]": 7,
    "[[10]]": 10,
    "Rating: [[6.5]]": 6.5,
    "Rating: **[[9]]**. It could name 3 more.": 9,
    "[[rating: 8]]": 8,
    "[[8/10]]": 8,
    "[[8,5]]": 8.5,
    "[[7.]]": 7,
    r"\[\[8\]\]": 8,
    "评分：【【８】】": 8,
    "[[1,000]]": None,
    'As asked, for example: "Rating: [[5]]". It is right. Rating: [[9]]': 9,
    "<think>Rating: [[2]]</think> Rating: [[9]]": 9,
    "<think>Rating: [[2]] but": None,
    "Rating: [5]": 5,
    "[[5]] ... so: [[5]]": 5,
    "Rating: 7": None,
    "As [3] says, it is 7.": None,
    "[[0]]": None,
    "[[11]]": None,
    "[[-3]]": None,
    "[[4]] for style, [[6]] for substance": None,
    "[[seven]]": None,
    "Rating: [[": None,
    "[RESULT] 4": None,
}
READINGS = [
    (reader, text, verdict)
    for reader, texts in (
        ("result_pair", RELATIVE),
        ("result_score", ABSOLUTE),
        ("brackets_pair", PAIR),
        ("brackets_score", SINGLE),
    )
    for text, verdict in texts.items()
]


@pytest.mark.parametrize(("reader", "text", "verdict"), READINGS)
def test_a_text_has_one_reading(reader, text, verdict):
    assert read(reader, text).verdict == verdict


def test_the_set_is_large_enough():
    assert len(READINGS) >= 60
    assert sum(verdict is None for _, _, verdict in READINGS) >= 30


PRAISE = {
    "Response B is significantly better than Response A.": "B",
    "Response A is good, but Response B is better.": "B",
    "Response B is better in depth. However, Response A is superior overall.": "A",
    "While Response A is good, it is Response B that is better.": "B",
    "Response A is worse.": "B",
    "Response A is outperformed by Response B.": "B",
    "Response A outperformed Response B.": "A",
    "The better response is Response A.": "A",
    "The best answer is B.": "B",
    "Assistant A's answer is stronger.": "A",
    "I prefer Response B": "B",
    "Response B falls short of the task": "A",
    "Neither Response A nor Response B is better.": None,
    "Response A is not better than Response B.": None,
    "Response A would be better with an example.": None,
    "Response A has 3 examples, Response B has 5.": None,
    "Response B names each step of the proof, with the reason for it and an example that shows "
    "where it would fail, making it the superior response.": "B",
    "Response A is clearer than Response B, making it the better response.": "A",
    "the answer a better person gives": None,
    "Antwort B ist besser.": None,
}


@pytest.mark.parametrize(("text", "name"), PRAISE.items())
def test_what_the_words_praise(text, name):
    assert praised(text) == name
    other = {"A": "B", "B": "A"}.get(name, "A")
    assert contradicts(f"{text} [RESULT] {other}", other) is (name is not None)
    assert not contradicts(f"{text} [RESULT] {name}", name)
    assert not contradicts(text, None)
    assert not contradicts(text, "C")


WHY = {
    ("brackets_pair", "", "stop"): "empty",
    ("brackets_pair", "", "length"): "cut off while thinking",
    ("brackets_pair", "<think>Say [[A]]", "length"): "cut off while thinking",
    ("brackets_pair", "Both are", "length"): "cut off before its end",
    # a template may have opened the thinking in the prompt
    ("brackets_pair", "Let me see. I lean to [[A]], but", "length"): "cut off before its end",
    ("result_score", "At first 4. [RESULT] 4\nWait,", "length"): "cut off before its end",
    ("brackets_pair", "First [[A]]</think>It is [[B]], since", "length"): None,
    ("brackets_pair", "[[A]]", "content_filter"): "stopped by the server's content filter",
    ("brackets_pair", "Error: overloaded", "stop"): "no verdict in the format",
    ("brackets_pair", "[[A]] or [[B]]", "stop"): "more than one verdict",
    ("brackets_score", "[[11]]", "stop"): "not from 1 to 10",
    ("brackets_score", "[[9]] And furthermore", "length"): "cut off before its end",
}


@pytest.mark.parametrize(("text", "why"), WHY.items())
def test_why_a_text_has_no_verdict(text, why):
    assert read(*text).why == why


@pytest.mark.parametrize(
    ("text", "rating", "against"),
    [
        ("The response is completely wrong.", 9, True),
        ("The response is completely wrong.", 2, False),
        ("The answer is excellent and complete.", 1, True),
        ("The answer is excellent and complete.", 10, False),
        ("The answer is not perfect.", 3, False),
        ("The assistant's answer is incorrect. Yet the response is perfect in form.", 8, False),
        ("It fails to answer the question.", 8, True),
        ("It has three steps.", 10, False),
        ("This is a perfect response.", 2, True),
        ("A perfect response would name the year.", 2, False),
        ("The assistant gave a wrong answer.", 10, True),
        ("It is not a wrong answer.", 10, False),
        ("The response is not wrong.", 9, False),
        ("The user gave no wrong answer.", 10, False),
        ("The answer provided is wrong.", 10, True),
        ("The response does not follow the instruction.", 9, True),
        ("It does not follow the beaten path.", 4, False),
        ("The response is wrong.", None, False),
    ],
)
def test_a_rating_is_held_to_the_judges_words(text, rating, against):
    assert rating_contradicts(f"{text} Rating: [[{rating}]]", rating, (1, 10)) is against


# SHA-256 of the prompts that prometheus-eval 0.1.20 and FastChat make of the same texts
OFFICIAL = {
    ("prometheus", "pair"): "5b3faee2468243e4",
    ("prometheus", "turn_1"): "8fe02f15b9965f42",
    ("prometheus", "turn_1_reference"): "d3c2b8c2139f2a55",
    ("fastchat", "pair"): "5e0a02232add6994",
    ("fastchat", "turn_1"): "4760a32373b6b5c4",
    ("fastchat", "turn_1_reference"): "86c48fa91580c6e6",
    ("fastchat", "turn_2"): "40d5c0c2bb5263ff",
    ("fastchat", "turn_2_reference"): "1587cc453857a1c4",
}
TEXTS = {
    "instruction": "I {x}",
    "answer_a": "aa",
    "answer_b": "bb",
    "question_1": "q1",
    "question_2": "q2",
    "answer_1": "a1",
    "answer_2": "a2",
    "reference_1": "r1",
    "reference_2": "r2",
}


@pytest.mark.parametrize(("name", "kind"), OFFICIAL)
def test_prompts_are_the_official_ones(name, kind):
    said = "\x00".join(
        f"{one['role']}\x01{one['content']}" for one in load_format(name).messages(kind, **TEXTS)
    )
    assert hashlib.sha256(said.encode()).hexdigest()[:16] == OFFICIAL[name, kind]


def test_prometheus_sees_the_first_turn_when_it_rates_the_second():
    (message,) = load_format("prometheus").messages("turn_2_reference", **TEXTS)
    places = [
        message["content"].index(text)
        for text in ("q1", "a1", "q2", "###Response to evaluate:\na2", "r2")
    ]
    assert places == sorted(places)
    assert message["content"].endswith("###Feedback: ")
