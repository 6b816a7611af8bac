"""Sentences of the pages are short, and so is the README."""

import re
import statistics

import pytest
from test_docs import PAGES, README, name

MEDIAN_WORDS, NINTH_DECILE_WORDS, PARAGRAPH_WORDS, README_BYTES = 15, 25, 90, 9216


def prose(text: str) -> list[str]:
    """The paragraphs and list items of a page, without code blocks, tables, headings, comments."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"^(?:\||#).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^(?=[ \t]*(?:[-*]|\d+\.) )", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"^[ \t]*(?:[-*]|\d+\.) ", "", text, flags=re.MULTILINE)
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def sentences(paragraph: str) -> list[str]:
    return [one for one in re.split(r"(?<=[.!?:])\s+(?=[A-Z`'\"(0-9])", paragraph) if one.strip()]


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_sentences_are_short(path):
    paragraphs = prose(path.read_text())
    lengths = sorted(len(one.split()) for part in paragraphs for one in sentences(part))
    assert statistics.median(lengths) <= MEDIAN_WORDS
    assert lengths[int(0.9 * (len(lengths) - 1))] <= NINTH_DECILE_WORDS
    longest = max(paragraphs, key=lambda part: len(part.split()))
    assert len(longest.split()) <= PARAGRAPH_WORDS, longest


def test_the_readme_is_short():
    assert README.stat().st_size <= README_BYTES
