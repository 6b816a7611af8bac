"""Scores of answers against references: sacrebleu's BLEU and rouge-score's ROUGE.

They are kept as per-row parts, which a paired bootstrap sums (sftlab/evaluation/significance.py).
"""

import re
from collections.abc import Callable, Sequence
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
# In scripts without spaces each character counts as a word, as in sacrebleu's zh tokenizer.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W_{_UNSPACED}]+")


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
        """Returns BLEU (0 to 100) [...] of summed parts [..., 10], smoothed as sacrebleu's."""
        flat = [
            BLEU.compute_bleu(
                list(row[:4]), list(row[4:8]), int(row[8]), int(row[9]), smooth_method="exp"
            ).score
            for row in sums.reshape(-1, 10)
        ]
        return np.array(flat).reshape(sums.shape[:-1])

    def signature(self) -> str:
        """Returns sacrebleu's signature, which must be equal where two BLEU scores are compared."""
        self.metric.corpus_score(["a"], [["a"]])
        return str(self.metric.get_signature())


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
    "bleu": (Bleu.score, "bleu_counts"),
    **{name: (mean, name) for name in ROUGE_TYPES},
}


def score_texts(
    answers: Sequence[str], references: Sequence[str], bleu: Bleu
) -> list[dict[str, Any]]:
    """Returns for each row the parts of BLEU (`bleu_counts`) and each ROUGE."""
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
    """Returns two models' records of the same rows, ready to be compared.

    A record is one side of a line of quality.jsonl. A score is left out where a record lacks its
    parts, since rows may have been scored before the score was added.
    """
    scores = {}
    for name, (score, field) in PARTS.items():
        if all(field in record for record in (*base, *tuned)):
            sides = [np.array([record[field] for record in side], float) for side in (base, tuned)]
            scores[name] = Paired(score, *(map(with_counts, sides) if score is mean else sides))
    return scores
