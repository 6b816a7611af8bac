"""BLEU, ROUGE and exact match: perfect for equal texts, near nothing for others, in any script."""

import json

import numpy as np
import pytest
from conftest import SHARED, needs_shared
from sacrebleu.metrics import BLEU

from sftlab.evaluation.quality_warnings import short_row_warnings
from sftlab.evaluation.significance import compare
from sftlab.evaluation.text_metrics import (
    AnyScript,
    Bleu,
    paired_scores,
    rouge,
    score_texts,
    short_references,
    tokenizer_of,
)

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "mat",
    "tree",
    "and",
    "then",
    "slept",
    "quickly",
    "while",
    "rain",
    "fell",
]


def test_references_against_themselves_are_perfect_and_shuffled_near_nothing():
    references = [
        f"{a} {b} {c} {d} {e}" for a, b, c, d, e in np.random.default_rng(0).choice(WORDS, (200, 5))
    ]
    check_extremes(references, near_bleu=3, near_rouge=0.35)


@needs_shared
def test_real_references_against_themselves_are_perfect_and_shuffled_near_nothing():
    rows = json.loads((SHARED / "alpaca_en_1k.json").read_text())
    check_extremes(
        [row["output"] for row in rows if row["output"].strip()][:300], near_bleu=1, near_rouge=0.15
    )


def check_extremes(references, near_bleu, near_rouge):
    bleu = Bleu()
    assert Bleu.score(bleu.parts(references, references).sum(axis=0)) == pytest.approx(100)
    worded = [text for text in references if any(c.isascii() and c.isalnum() for c in text)]
    assert rouge(worded, worded)[:, [0, 2]].min() == 1
    shuffled = references[1:] + references[:1]
    assert Bleu.score(bleu.parts(shuffled, references).sum(axis=0)) < near_bleu
    assert rouge(shuffled, references)[:, 1].mean() < near_rouge / 2
    empty = [""] * len(references)
    assert Bleu.score(bleu.parts(empty, references).sum(axis=0)) == 0
    assert rouge(empty, references).max() == 0


@pytest.mark.parametrize("rows", [10, 400])
def test_perfect_answers_are_not_taken_for_certainty(rows):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(6, 20))) for _ in range(rows)]
    scored = score_texts(texts, texts, Bleu())
    found = compare(paired_scores(scored, scored), 400)
    # 1.96^2 of 1.96^2 + rows: Wilson's lower end where all are right
    low = 1 - 3.8415 / (3.8415 + rows)
    for name, scale in (("bleu", 100), ("exact_match", 1), ("rouge1", 1), ("rougeL", 1)):
        assert found[name]["tuned"]["interval_95"] == pytest.approx([scale * low, scale], rel=1e-4)


def test_rouge_knows_words_of_any_script_and_keeps_its_own_of_ascii():
    from rouge_score.rouge_scorer import RougeScorer

    plain = [("The cat_sat, on 2 mats!", "a cat sat on two mats"), ("", "x"), ("don't", "do not")]
    theirs = [RougeScorer(["rouge1", "rougeL"]).score(b, a) for a, b in plain]
    ours = rouge(*zip(*plain, strict=True))
    assert ours[:, [0, 2]].tolist() == [
        [one["rouge1"].fmeasure, one["rougeL"].fmeasure] for one in theirs
    ]
    other = ["Москва — столица России", "东京是日本的首都", "Grüße aus Köln"]
    assert rouge(other, other).tolist() == [[1, 1, 1]] * 3
    assert 0 < rouge(["东京是中国的首都"], ["东京是日本的首都"])[0, 0] < 1
    assert rouge(["Koln"], ["Köln"])[0, 0] == 0


def test_bleu_of_the_parts_is_sacrebleus_corpus_score():
    rng = np.random.default_rng(0)
    texts = [
        [" ".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(80)] for _ in range(2)
    ]
    for tokenize in ("13a", "char"):
        mine = Bleu(tokenize)
        expected = BLEU(tokenize=tokenize).corpus_score(texts[0], [texts[1]]).score
        assert Bleu.score(mine.parts(*texts).sum(axis=0)) == pytest.approx(expected, abs=1e-9)
        assert f"tok:{tokenize}" in mine.signature()
    with pytest.raises(ValueError, match="unknown to sacrebleu"):
        Bleu("13b")


CHINESE, JAPANESE, THAI = "今天下雨了。", "今日は雨です。", "วันนี้ฝนตก"


@pytest.mark.parametrize(
    ("text", "tokenizer"),
    [(CHINESE, "zh"), (JAPANESE, "char"), (THAI, "char"), ("Grüße aus Köln", "13a"), ("7", "13a")],
)
def test_bleus_tokenizer_follows_the_script_of_the_references(text, tokenizer):
    assert tokenizer_of([text] * 3) == tokenizer
    if tokenizer != "13a":
        bleu = Bleu(tokenizer)
        assert Bleu.score(bleu.parts([text], [text]).sum(axis=0)) == pytest.approx(100)


def test_short_answers_have_exact_match_and_no_bleu():
    references = ["yes", "no", "yes", "no"]
    base, tuned = (
        score_texts(answers, references, Bleu())
        for answers in (["yes", "yes", "no", "no"], ["yes", " no ", "yes", "no"])
    )
    pairs = paired_scores(base, tuned)
    assert set(pairs) == {"exact_match", "rouge1", "rougeL"}
    found = compare(pairs, 100)["exact_match"]
    assert (found["base"]["value"], found["tuned"]["value"]) == (0.5, 1.0)
    assert short_references(base, "bleu") == 4
    assert rouge(["🎉 👍"], ["🎉 👍"]).tolist() == [[1, 1, 1]]


def test_final_numbers_are_scored_where_every_reference_has_one():
    references = ["3 + 4 = 7\n#### 7", "60 * 20\n#### 1,200"]
    base = score_texts(["It is 8 of 7.", ""], references, Bleu())
    tuned = score_texts(["so\n#### 7", "It costs $1200.00"], references, Bleu())
    found = compare(paired_scores(base, tuned), 100)["final_number"]
    assert (found["base"]["value"], found["tuned"]["value"]) == (0.5, 1.0)
    records = [
        {"reference": text, "base": one} for text, one in zip(references * 2, base * 2, strict=True)
    ]
    assert not any("final number" in said for said in short_row_warnings(records))
    records[0]["reference"] = "7"
    (said,) = [said for said in short_row_warnings(records) if "final number" in said]
    assert "1 of 4 references" in said
    unmarked = score_texts(["7", "8"], [references[0], "It is 8."], Bleu())
    assert all("final_number" not in record for record in unmarked)
    assert "final_number" not in paired_scores(unmarked, unmarked)


def test_vowel_signs_are_part_of_a_word():
    assert rouge(["का"], ["की"]).tolist() == [[0.0, 0.0, 0.0]]
    assert AnyScript().tokenize("नमस्ते दुनिया, தமிழ்") == ["नमस्ते", "दुनिया", "தமிழ்"]
