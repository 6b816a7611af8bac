"""Read a judge's text: its verdict, and whether its words contradict the verdict.

A text without exactly one verdict, in the judge's format and on its scale, is unparsed (None). It
is never read as a tie or as a middle score.
"""

import re
from collections.abc import Callable

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
_DOUBLE_LETTER = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_DOUBLE_NUMBER = re.compile(
    r"\[\[\s*(?:rating:?\s*)?(\d+(?:\.\d+)?)(?:\s*/\s*10)?\s*\]\]", re.IGNORECASE
)
# FastChat's second pattern, only behind the word "rating": "[7]" alone may be a footnote
_RATED = re.compile(r"\brating\W{1,4}\[(\d+(?:\.\d+)?)\]", re.IGNORECASE)


def result_pair(text: str) -> Verdict:
    """Returns Prometheus 2's verdict: `[RESULT] A` or `[RESULT] B` at the end of a line."""
    return _marked(text, _LETTER, str.upper)


def result_score(text: str) -> Verdict:
    """Returns Prometheus 2's rating: `[RESULT]` and an integer from 1 to 5 at the end of a line."""
    return _in_scale(_marked(text, _INTEGER, float), 1, 5)


def brackets_pair(text: str) -> Verdict:
    """Returns LLM-as-a-judge's verdict (Zheng et al. 2023): `[[A]]`, `[[B]]`, or `[[C]]` (tie)."""
    return _the_one(_DOUBLE_LETTER.findall(text))


def brackets_score(text: str) -> Verdict:
    """Returns LLM-as-a-judge's rating: `[[rating]]` from 1 to 10."""
    found = _DOUBLE_NUMBER.findall(text) or _RATED.findall(text)
    return _in_scale(_the_one([float(number) for number in found]), 1, 10)


READERS: dict[str, Callable[[str], Verdict]] = {
    "result_pair": result_pair,
    "result_score": result_score,
    "brackets_pair": brackets_pair,
    "brackets_score": brackets_score,
}


def _marked(text: str, pattern: re.Pattern, convert: Callable[[str], Verdict]) -> Verdict:
    said = _ECHO.sub("", text)
    found = pattern.findall(said)
    if len(found) != len(re.findall(_MARK, said, re.IGNORECASE)):
        return None  # a mark without a verdict behind it
    return _the_one([convert(verdict) for verdict in found])


def _the_one(found: list) -> Verdict:
    return found[0] if len(set(found)) == 1 else None


def _in_scale(verdict: Verdict, low: float, high: float) -> Verdict:
    return verdict if verdict is not None and low <= verdict <= high else None


_KIND = r"(?:response|assistant|answer|output|model)\s+"
_LETTERED = r"['\"“*]*(?P<name>(?-i:[AB]))\b['\"”*]*(?:'s\s+\w+)?"
_BETTER = (
    r"(?:better|superior|stronger|preferable|preferred|best|excels|wins|winner"
    r"|(?:outperform|surpass)(?:s|es|ed)(?!\s+by))"
)
_WORSE = r"(?:worse|inferior|weaker|falls short|(?:outperformed|surpassed)\s+by)"
_GAP = rf"(?P<gap>(?:(?!{_KIND}(?-i:[AB])\b)[^.;!?\n]){{0,60}}?\b)"
# patterns, and whether the answer they name is the worse one
_SAYINGS = [
    (rf"\b{_KIND}{_LETTERED}{_GAP}{_WORSE}\b", True),
    (rf"\b{_KIND}{_LETTERED}{_GAP}{_BETTER}\b", False),
    (
        rf"\b{_BETTER}\s+(?:response|answer|assistant|one|choice|option){_GAP}(?:is|:)\s+(?:{_KIND})?{_LETTERED}",
        False,
    ),
    (rf"\b(?:prefer|choose|favou?r)(?P<gap>\s+){_KIND}{_LETTERED}", False),
]
_SAYINGS = [(re.compile(pattern, re.IGNORECASE), worse) for pattern, worse in _SAYINGS]
_NEGATED = re.compile(r"\b(?:not|no|never|nor|hardly|cannot|if|would|could)\b|n't\b", re.IGNORECASE)
_CLAUSE = re.compile(
    r"[.;!?\n]+(?:\s|$)|,?\s+(?:but|however|while|whereas|although|though|yet)\b,?", re.IGNORECASE
)


def praised(text: str) -> str | None:
    """Returns the answer (A or B) that a judgement's words call better, or None where unclear.

    Only English is read, and the last clause that compares decides. It checks judges and is never
    a verdict.
    """
    found = None
    for clause in _CLAUSE.split(_without_verdict(text)):
        for pattern, worse in _SAYINGS:
            match = pattern.search(clause)
            if (
                match
                and not _NEGATED.search(match["gap"])
                and not clause.lstrip().lower().startswith(("neither", "if"))
            ):
                name = match["name"].upper()
                found = {"A": "B", "B": "A"}[name] if worse else name
                break
    return found


def contradicts(text: str, verdict: Verdict) -> bool:
    """Whether a judgement's words call one answer better and its verdict names the other."""
    words = praised(text) if verdict in ("A", "B") else None
    return words is not None and words != verdict


def _without_verdict(text: str) -> str:
    return _DOUBLE_LETTER.sub("", re.split(_MARK, text, flags=re.IGNORECASE)[0])
