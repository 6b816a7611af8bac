"""Scores of answers against references: exact match, final number, sacrebleu's BLEU, ROUGE.

They are kept as per-row parts, which a paired bootstrap sums (sftlab/evaluation/significance.py).
"""

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics import BLEU

from sftlab.evaluation.final_number import final_number, marked_number
from sftlab.evaluation.significance import Paired, mean, perplexity, with_counts

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
NAMES = {
    "response_perplexity": "response perplexity",
    "text_perplexity": "whole-text perplexity",
    "exact_match": "exact match",
    "final_number": "final number right",
    "bleu": "BLEU",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
}
ROUGE_SIGNATURE = (
    "F-measure, mean over rows|stemmer:no|words of any script, and symbols|"
    f"rouge-score:{version('rouge-score')}"
)
# In scripts without spaces each character counts as a word, as in sacrebleu's zh tokenizer: kana,
# Chinese characters, and Thai, Lao, Burmese and Khmer.
_KANA = "\u3040-\u30ff\uff66-\uff9f"
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_SOUTHEAST = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_UNSPACED = _KANA + _HAN + _SOUTHEAST
# arrows, mathematical and other signs, emoji
_SYMBOLS = "\u2190-\u2bff\U0001f000-\U0001faff"
# vowel signs and accents, which are no letters of their own: Hindi's "ki" and "ka" differ in one
_MARKS = "".join(
    chr(code)
    for code in range(0x300, 0x1D00)
    if unicodedata.category(chr(code)) in ("Mn", "Mc") and not re.match(f"[{_UNSPACED}]", chr(code))
)
_WORD = re.compile(f"[{_UNSPACED}{_SYMBOLS}]|(?:[^\\W_{_UNSPACED}]|[{_MARKS}])+")
# Letters of such scripts weigh more than others, since one is a word or a syllable.
_LEAST_UNSPACED, _LEAST_KANA = 0.3, 0.1
# the least number of a reference's tokens at which a score says anything
LEAST_TOKENS = {"bleu": 4, "rouge2": 2}
_REFERENCE_LENGTH = 9  # its place among BLEU's counts


class Bleu:
    """Corpus BLEU with sacrebleu's defaults.

    `tokenize` is one of sacrebleu's tokenizers (13a, intl, zh, char, ...).
    """

    def __init__(self, tokenize: str = "13a") -> None:
        if tokenize not in BLEU.TOKENIZERS:
            raise ValueError(
                f"bleu_tokenize {tokenize!r} is unknown to sacrebleu: one of "
                f"{', '.join(BLEU.TOKENIZERS)}"
            )
        try:
            self.metric = BLEU(tokenize=tokenize)
        except (ImportError, RuntimeError, OSError) as error:
            said = " ".join(str(error).split())
            raise ValueError(f"bleu_tokenize {tokenize} does not load: {said}") from error

    def parts(self, answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """Returns counts [rows, 10].

        They are n-gram matches (1 to 4), n-grams of the answer (1 to 4), answer length and
        reference length.
        """
        rows = [
            self.metric.corpus_score([a], [[r]]) for a, r in zip(answers, references, strict=True)
        ]
        return np.array(
            [[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in rows], dtype=float
        )

    @staticmethod
    def score(sums: np.ndarray) -> np.ndarray:
        """Returns BLEU (0 to 100) [...] of summed parts [..., 10], smoothed as sacrebleu's (exp).

        The nth order of n-grams without a match counts as 1 / 2^n matches.
        """
        matches, ngrams = sums[..., :4], sums[..., 4:8]
        answer, reference = sums[..., 8], sums[..., 9]
        missed = (matches == 0) & (ngrams > 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            smoothed = np.where(missed, 0.5 ** np.cumsum(missed, axis=-1), matches)
            precisions = np.where(ngrams > 0, smoothed / ngrams, 0.0)
            brevity = np.where(answer < reference, np.exp(1 - reference / answer), 1.0)
            found = 100 * brevity * np.exp(np.log(precisions).mean(axis=-1))
        return np.where(matches.any(axis=-1) & (answer > 0), found, 0.0)

    def signature(self) -> str:
        """Returns sacrebleu's signature, which must be equal where two BLEU scores are compared."""
        self.metric.corpus_score(["a"], [["a"]])
        return str(self.metric.get_signature())


def tokenizer_of(references: Sequence[str]) -> str:
    """Returns sacrebleu's tokenizer for the script of the references.

    It is zh for Chinese, char for Japanese, Thai and others without spaces, else 13a.
    """
    letters = [letter for text in references for letter in text if letter.isalpha()]
    counted = "".join(letters)
    kana, han, others = (
        len(re.findall(f"[{script}]", counted)) for script in (_KANA, _HAN, _SOUTHEAST)
    )
    unspaced = kana + han + others
    if not letters or unspaced < _LEAST_UNSPACED * len(letters):
        return "13a"
    return "zh" if kana + others < _LEAST_KANA * unspaced else "char"


def exact_match(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """Returns 1 for an answer that is its reference but for white space, else 0."""
    pairs = zip(answers, references, strict=True)
    return [float(answer.split() == reference.split()) for answer, reference in pairs]


def right_numbers(answers: Sequence[str], references: Sequence[str]) -> list[dict[str, float]]:
    """Returns `final_number` for each row: 1 for an answer that comes to its reference's number.

    Rows are empty where a reference has no `#### n`, for then the score is not known of all.
    """
    numbers = [marked_number(reference) for reference in references]
    if None in numbers:
        return [{} for _ in references]
    pairs = zip(answers, numbers, strict=True)
    return [{"final_number": float(final_number(answer) == number)} for answer, number in pairs]


class AnyScript(Tokenizer):
    """Lower-case words of any script.

    On ASCII text they are those of rouge-score's own tokenizer, which drops all other characters.
    """

    def tokenize(self, text: str) -> list[str]:
        """Returns the words of a text."""
        return _WORD.findall(text.lower())


def rouge(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Returns the F-measures [rows, 3] of ROUGE-1, ROUGE-2 and ROUGE-L, from 0 to 1."""
    scorer = RougeScorer(list(ROUGE_TYPES), tokenizer=AnyScript())
    rows = [
        scorer.score(reference, answer)
        for answer, reference in zip(answers, references, strict=True)
    ]
    return np.array([[row[name].fmeasure for name in ROUGE_TYPES] for row in rows]).reshape(
        -1, len(ROUGE_TYPES)
    )


# how a score is made of summed parts, and the field of a record that holds a row's parts
PARTS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "response_perplexity": (perplexity, "response_nll"),
    "text_perplexity": (perplexity, "text_nll"),
    "exact_match": (mean, "exact_match"),
    "final_number": (mean, "final_number"),
    "bleu": (Bleu.score, "bleu_counts"),
    **{name: (mean, name) for name in ROUGE_TYPES},
}

# from where to where a score goes, and whether it is judged by its logarithm
SCALES = dict.fromkeys(PARTS, (0.0, 1.0)) | {"bleu": (0.0, 100.0)}
SCALES |= dict.fromkeys(("response_perplexity", "text_perplexity"), (1.0, math.inf, True))


def score_texts(
    answers: Sequence[str], references: Sequence[str], bleu: Bleu
) -> list[dict[str, Any]]:
    """Returns for each row `exact_match`, the parts of BLEU (`bleu_counts`) and each ROUGE.

    Where every reference has a `#### n`, `final_number` too.
    """
    counts, overlaps = bleu.parts(answers, references), rouge(answers, references)
    return [
        {
            "exact_match": same,
            **number,
            "bleu_counts": count.astype(int).tolist(),
            **dict(zip(ROUGE_TYPES, overlap.tolist(), strict=True)),
        }
        for same, number, count, overlap in zip(
            exact_match(answers, references),
            right_numbers(answers, references),
            counts,
            overlaps,
            strict=True,
        )
    ]


def short_references(records: Sequence[dict[str, Any]], score: str) -> int:
    """Returns how many references have too few tokens for `score` to say anything of them."""
    least = LEAST_TOKENS.get(score, 0)
    return sum(record["bleu_counts"][_REFERENCE_LENGTH] < least for record in records)


def paired_scores(
    base: Sequence[dict[str, Any]], tuned: Sequence[dict[str, Any]]
) -> dict[str, Paired]:
    """Returns two models' records of the same rows, ready to be compared.

    A record is one side of a line of quality.jsonl. A score is left out where a record lacks its
    parts, since rows may have been scored before the score was added, and where every reference
    is too short for it: BLEU needs four tokens, ROUGE-2 two.
    """
    scores = {}
    for name, (score, field) in PARTS.items():
        known = all(field in record for record in (*base, *tuned))
        if known and (name not in LEAST_TOKENS or short_references(base, name) < len(base)):
            sides = [np.array([record[field] for record in side], float) for side in (base, tuned)]
            parts = map(with_counts, sides) if score is mean else sides
            scores[name] = Paired(score, *parts, *SCALES[name])
    return scores
