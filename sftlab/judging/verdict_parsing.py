"""Read a judge's text: its verdict, or why there is none.

A text without exactly one verdict, in the judge's format and on its scale, is unparsed (None). It
is never read as a tie or as a middle score. Thinking is not read (sftlab/judging/final_text.py).
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from sftlab.judging.final_text import final_text, thinking_ended

Verdict = str | float | None

# what may stand around a verdict, as in "[RESULT] (A)" and "[RESULT]: **B**."
_OPEN = r"[\s:=\"'“”‘’`*_(\[]*"
_CLOSE = r"[^\S\n\"'“”‘’`*_)\].]*[\"'“”‘’`*_)\].\t ]*$"
_MARK = r"\[RESULT\]"
# the format in the prompt's own words, which a judge may repeat before its verdict
_ECHO = re.compile(_MARK + r"\s*\((?:A or B|an integer number between 1 and 5)\)", re.IGNORECASE)
_LETTER = re.compile(rf"{_MARK}{_OPEN}(?:Response\s+)?([AB]){_CLOSE}", re.IGNORECASE | re.MULTILINE)
_INTEGER = re.compile(
    rf"{_MARK}{_OPEN}(\d+)(?:\s*/\s*5|\s+out\s+of\s+5)?{_CLOSE}", re.IGNORECASE | re.MULTILINE
)
_ONE_LETTER = r"\[\[[\s*]*([ABC])[\s*]*\]\]"
_DOUBLE_LETTER = re.compile(_ONE_LETTER)
_NUMBER = r"\d+(?:\.\d+|,\d{1,2})?"
_DOUBLE_NUMBER = re.compile(
    rf"\[\[[\s*]*(?:rating:?\s*)?({_NUMBER})\.?(?:\s*/\s*10)?[\s*]*\]\]", re.IGNORECASE
)
# FastChat's second pattern, only behind the word "rating": "[7]" alone may be a footnote
_RATED = re.compile(rf"\brating\W{{1,4}}\[({_NUMBER})\.?\]", re.IGNORECASE)
# the same of the bracket formats: a verdict in quotes, with its condition, or in a list of three
_QUOTED = re.compile(rf"[\"'“‘`]{_ONE_LETTER}[\"'”’`]")
_CONDITION = re.compile(
    rf"{_ONE_LETTER}\W{{1,3}}(?:if\s+assistant\s+[AB]\s+is|for\s+a\s+tie)", re.I
)
_NOT = re.compile(rf"\b(?:not|neither|nor)\s+(?:\w+\s+)?{_ONE_LETTER}", re.IGNORECASE)
_ALL_THREE = re.compile(r"\[\[A\]\]\W+\[\[B\]\]\W+(?:or|and)?\W*\[\[C\]\]", re.IGNORECASE)
_EXAMPLE = re.compile(
    r"\b(?:for example|for instance|such as|e\.g\.)[\s,:]*[\"'“‘`]?(?:rating:?\s*)?"
    rf"\[\[{_NUMBER}\]\][\"'”’`]?",
    re.IGNORECASE,
)


# brackets, letters and digits of Chinese and Japanese texts, and the format's own
_WIDE = str.maketrans(
    "【】［］（）：。．／" + "ＡＢＣ０１２３４５６７８９", "[][]():../" + "ABC0123456789"
)

# kinds of texts without a verdict: nothing, other words, thinking alone, a text that was cut off
EMPTY, OTHER_WORDS = "empty", "no verdict in the format"
THINKING, CUT_OFF = "cut off while thinking", "cut off before its end"
FILTERED = "stopped by the server's content filter"
# what a server that fails may say
NO_JUDGEMENT = (EMPTY, OTHER_WORDS)


class Reading(NamedTuple):
    """A judgement's verdict, or None and the kind of text without one (`why`)."""

    verdict: Verdict
    why: str | None


def read(reader: str, text: str, finish: str = "stop") -> Reading:
    """Returns what a judgement says in the format `reader`, a name of READERS.

    `finish` is stop, length for a text that was cut off at the longest judgement, or
    content_filter. A text that was cut off counts only behind the end of its thinking.
    """
    find, scale = READERS[reader]
    if finish == "content_filter":
        return Reading(None, FILTERED)
    if not text.strip():
        # a server gives thinking in another field
        return Reading(None, THINKING if finish == "length" else EMPTY)
    if (said := final_text(text)) is None:
        return Reading(None, THINKING)
    if finish == "length" and not thinking_ended(text):
        return Reading(None, CUT_OFF)
    found = find(said.translate(_WIDE).replace("\\[", "[").replace("\\]", "]"))
    if len(set(found)) == 1 and found[0] is not None:
        if scale and not scale[0] <= found[0] <= scale[1]:
            return Reading(None, f"not from {scale[0]} to {scale[1]}")
        return Reading(found[0], None)
    if finish == "length":
        return Reading(None, CUT_OFF)
    return Reading(None, "more than one verdict" if len(found) > 1 else OTHER_WORDS)


def _marked(pattern: re.Pattern, convert: Callable[[str], Verdict], text: str) -> list[Verdict]:
    """Returns the verdicts behind the marks; None for a mark without one behind it."""
    said = _ECHO.sub("", text)
    found = [convert(verdict) for verdict in pattern.findall(said)]
    marks = len(re.findall(_MARK, said, re.IGNORECASE))
    return found + [None] * (marks - len(found))


def _letters(text: str) -> list[Verdict]:
    said = _NOT.sub("", _CONDITION.sub("", _ALL_THREE.sub("", text)))
    if len(set(_QUOTED.findall(said))) > 1:
        said = _QUOTED.sub("", said)
    return _DOUBLE_LETTER.findall(said)


def _numbers(text: str) -> list[Verdict]:
    without = _EXAMPLE.sub("", text)
    said = without if _DOUBLE_NUMBER.search(without) else text
    found = _DOUBLE_NUMBER.findall(said) or _RATED.findall(said)
    return [float(number.replace(",", ".")) for number in found]


Find = Callable[[str], list[Verdict]]
# Prometheus 2: `[RESULT]` at the end of a line with A or B, or an integer from 1 to 5.
# LLM-as-a-judge (Zheng et al. 2023): `[[A]]`, `[[B]]`, `[[C]]` (tie), or `[[rating]]`, 1 to 10.
READERS: dict[str, tuple[Find, tuple[int, int] | None]] = {
    "result_pair": (lambda text: _marked(_LETTER, str.upper, text), None),
    "result_score": (lambda text: _marked(_INTEGER, float, text), (1, 5)),
    "brackets_pair": (_letters, None),
    "brackets_score": (_numbers, (1, 10)),
}


def without_verdict(text: str) -> str:
    """Returns the words of a judgement, without thinking and without its verdict."""
    said = final_text(text) or ""
    return _DOUBLE_LETTER.sub("", re.split(_MARK, said, flags=re.IGNORECASE)[0])
