"""Which fields do the words of a command line set? One reading for all scripts."""

import difflib
from collections.abc import Collection, Iterable

# How close a name must be to count as a misspelling of another.
_NEAR = 0.8


def near_name(name: str, known: Collection[str]) -> str | None:
    """Returns the known name that a misspelt one is near to; None where none is."""
    return next(iter(difflib.get_close_matches(name.lower(), known, n=1, cutoff=_NEAR)), None)


def field_name(word: str) -> str | None:
    """Returns the field that `--field`, `--field=value` or `--the-field` names; None without one.

    Hyphens and underscores mean the same.
    """
    if not word.startswith("--") or len(word) == 2:
        return None
    return word[2:].partition("=")[0].replace("-", "_")


def field_words(words: Iterable[str]) -> dict[str, list[str]]:
    """Returns the values of each field that is named, as words. The last naming of a field counts.

    Words before the first field belong to none and are left out.
    """
    found: dict[str, list[str]] = {}
    name = None
    for word in words:
        if named := field_name(word):
            name, has_value = named, "=" in word
            found[name] = [word.partition("=")[2]] if has_value else []
        elif name is not None:
            found[name].append(word)
    return found
