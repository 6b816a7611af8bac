"""Scores of answers against references: sacrebleu's BLEU and rouge-score's ROUGE, kept as per-row
parts.

Parts are what a paired bootstrap sums over rows (see sftlab/evaluation/significance.py).
"""

import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics import BLEU

from sftlab.evaluation.significance import Paired, mean, perplexity, with_counts

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
NAMES = {
    "response_perplexity": "response perplexity",
    "text_perplexity": "whole-text perplexity",
    "bleu": "BLEU",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
}
ROUGE_SIGNATURE = (
    f"F-measure, mean over rows|stemmer:no|words of any script|rouge-score:{version('rouge-score')}"
)
# Scripts without blanks between words: each character counts as one, as sacrebleu's zh has it.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W_{_UNSPACED}]+")


class Bleu:
    """Corpus BLEU with sacrebleu's defaults.

    `tokenize` is one of its tokenizers (13a, intl, zh, char, ...).
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
            raise ValueError(f"bleu_tokenize {tokenize} cannot be had here: {said}") from error

    def parts(self, answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """Counts [rows, 10]: n-gram matches of 1 to 4, n-grams drawn of 1 to 4, answer length,
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
        """Summed parts [..., 10] to BLEU (0 to 100) [...], smoothed as sacrebleu's corpus score."""
        flat = [
            BLEU.compute_bleu(
                list(row[:4]), list(row[4:8]), int(row[8]), int(row[9]), smooth_method="exp"
            ).score
            for row in sums.reshape(-1, 10)
        ]
        return np.array(flat).reshape(sums.shape[:-1])

    def signature(self) -> str:
        """sacrebleu's signature: what must be equal where two BLEU scores are compared."""
        self.metric.corpus_score(["a"], [["a"]])
        return str(self.metric.get_signature())


class AnyScript(Tokenizer):
    """Words in small letters: rouge-score's own of ASCII text.

    Of all other it would keep nothing.
    """

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return _WORD.findall(text.lower())


def rouge(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """F-measures [rows, 3] of ROUGE-1, ROUGE-2 and ROUGE-L, from 0 to 1."""
    scorer = RougeScorer(list(ROUGE_TYPES), tokenizer=AnyScript())
    rows = [
        scorer.score(reference, answer)
        for answer, reference in zip(answers, references, strict=True)
    ]
    return np.array([[row[name].fmeasure for name in ROUGE_TYPES] for row in rows]).reshape(
        -1, len(ROUGE_TYPES)
    )


def score_texts(
    answers: Sequence[str], references: Sequence[str], bleu: Bleu
) -> list[dict[str, Any]]:
    """Per row the parts of BLEU (`bleu_counts`) and each ROUGE."""
    counts, overlaps = bleu.parts(answers, references), rouge(answers, references)
    return [
        {
            "bleu_counts": count.astype(int).tolist(),
            **dict(zip(ROUGE_TYPES, overlap.tolist(), strict=True)),
        }
        for count, overlap in zip(counts, overlaps, strict=True)
    ]


def paired_scores(
    base: Sequence[dict[str, Any]], tuned: Sequence[dict[str, Any]]
) -> dict[str, Paired]:
    """Two models' records of the same rows (a side each of the lines of quality.jsonl), ready to be
    compared.
    """

    def both(field: str) -> list[np.ndarray]:
        return [np.array([record[field] for record in side], float) for side in (base, tuned)]

    scores = {
        "response_perplexity": Paired(perplexity, *both("response_nll")),
        "text_perplexity": Paired(perplexity, *both("text_nll")),
        "bleu": Paired(Bleu.score, *both("bleu_counts")),
    }
    return scores | {name: Paired(mean, *map(with_counts, both(name))) for name in ROUGE_TYPES}
