"""Do a judge's words contradict its verdict or its rating? English alone is read."""

import re

from sftlab.judging.verdict_parsing import Verdict, without_verdict

_KIND = r"(?:response|assistant|answer|output|model)\s+"
_LETTERED = r"['\"“*]*(?P<name>(?-i:[AB]))\b['\"”*]*(?:'s\s+\w+)?"
_BETTER = (
    r"(?:better|superior|stronger|preferable|preferred|best|excels|wins|winner"
    r"|(?:outperform|surpass)(?:s|es|ed)(?!\s+by))"
)
_WORSE = r"(?:worse|inferior|weaker|falls short|(?:outperformed|surpassed)\s+by)"
# "..., making it the superior response" may stand far behind the answer's name
_GAP = rf"(?P<gap>(?:(?!{_KIND}(?-i:[AB])\b)[^.;!?\n]){{0,200}}?\b)"
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
# the answer that another one is measured by: "is clearer than Response B, making it the better one"
_MEASURE = re.compile(
    rf"\b(?:than|over|unlike|(?:compared|relative)\s+(?:to|with))\s+(?:that\s+of\s+)?{_KIND}"
    r"['\"“*]*(?-i:[AB])\b['\"”*]*(?:'s(?:\s+\w+)?)?",
    re.IGNORECASE,
)
_WHAT = r"\b(?:response|answer|assistant|it|this|that)(?:'s\s+\w+)?(?:\s+(?:provided|given))?\s+"
_IS = _WHAT + r"(?:is|was)\s+(?:(?!not\b|no\b|never\b|hardly\b)\w+\s+){0,2}?"
_GOOD = r"(?:excellent|perfect|outstanding|flawless|exceptional)"
_BAD = r"(?:incorrect|wrong|irrelevant|nonsensical|useless|unhelpful|poor|terrible)"
# "gives a wrong answer" says it of this answer, "a perfect response would" of none
_GIVES = r"\b(?:is|was|gives|gave|provides|provided)\s+an?\s+(?:\w+\s+)?{0}\s+(?:response|answer)\b"
_PRAISE = re.compile(
    rf"{_IS}(?:{_GOOD}|(?:entirely|fully|completely)\s+correct)\b|{_GIVES.format(_GOOD)}",
    re.IGNORECASE,
)
_BLAME = re.compile(
    rf"{_IS}{_BAD}\b|{_GIVES.format(_BAD)}"
    r"|\b(?:completely|entirely|totally)\s+(?:wrong|incorrect|irrelevant|fails?)\b"
    r"|\bfails\s+to\s+(?:answer|address|follow)\b|\bdoes\s+not\s+(?:answer|address|follow)\s+the\b",
    re.IGNORECASE,
)
_DENIED = re.compile(r"\b(?:not|no|never|hardly|neither|if|would|could)\b|n't\b", re.IGNORECASE)


def praised(text: str) -> str | None:
    """Returns the answer (A or B) that a judgement's words call better, or None where unclear.

    The last clause that compares decides. It checks judges and is never a verdict.
    """
    found = None
    for clause in _CLAUSE.split(_MEASURE.sub("", without_verdict(text))):
        for pattern, worse in _SAYINGS:
            match = pattern.search(clause)
            if (
                match
                and not _NEGATED.search(_near(match["gap"]))
                and not clause.lstrip().lower().startswith(("neither", "if"))
            ):
                name = match["name"].upper()
                found = {"A": "B", "B": "A"}[name] if worse else name
                break
    return found


def _near(gap: str) -> str:
    """Returns the words before a comparison that may deny it: of many, those behind a comma."""
    return gap if len(gap) <= 60 else gap.rpartition(",")[2]


def contradicts(text: str, verdict: Verdict) -> bool:
    """Whether a judgement's words call one answer better and its verdict names the other."""
    words = praised(text) if verdict in ("A", "B") else None
    return words is not None and words != verdict


def rating_contradicts(text: str, rating: float | None, scale: tuple[int, int]) -> bool:
    """Whether a rating is in the scale's upper quarter and the words say wrong, or the reverse.

    Only strong words count: perfect, excellent, wrong, irrelevant. The last of them decides.
    """
    if rating is None:
        return False
    low, high = scale
    place, found = (rating - low) / (high - low), None
    for clause in _CLAUSE.split(without_verdict(text)):
        for pattern, good in ((_PRAISE, True), (_BLAME, False)):
            match = pattern.search(clause)
            # "does not answer the question" is a denial of its own
            denied = match and _DENIED.search(clause[: match.start()] + match[0] * good)
            if match and not denied:
                found = good
    return (found is True and place <= 0.25) or (found is False and place >= 0.75)
