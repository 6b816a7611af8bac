"""Which fields do the words of a command line set? One reading for all scripts."""

from collections.abc import Iterable


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
