"""The options of a script, spelt with hyphens or with underscores."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn
from urllib.parse import urlsplit

from sftlab.field_words import near_name

# characters: a value of a megabyte is no sentence
LONGEST_MESSAGE = 600


def server_address(text: str) -> str:
    """Returns the address of a server. Raises argparse's error for what is none."""
    try:
        parts = urlsplit(text)
        there = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        there = None
    if not there:
        raise argparse.ArgumentTypeError(
            f"{text} is no address of a server: write one such as http://127.0.0.1:8000/v1"
        )
    return text


class Options(argparse.ArgumentParser):
    """argparse that reads `--at-once` and `--at_once` as one option, and abbreviates none.

    An option that it does not know is left over with underscores, as a recipe's field is spelt.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **({"allow_abbrev": False} | kwargs))
        self._needed: dict[str, tuple[str, str | None]] = {}

    def needs(self, option: str, other: str, value: str | None = None) -> None:
        """Refuse `option` where it is given and `other` is not, or has another value."""
        self._needed[option] = (other, value)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Returns the options. Exits with status 2 for a word that is none; says a near one."""
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            name = rest[0].partition("=")[0]
            near = near_name(name, list(self._option_string_actions))
            self.error(f"unknown option {name}" + (f"; did you mean {near}?" if near else ""))
        return found

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Returns the options, and the words that are none of them."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        own = [self._spelt(word) for word in words[:end]]
        found, rest = super().parse_known_args([*own, *words[end:]], namespace)
        self._refuse_in_vain({word.partition("=")[0] for word in own}, found)
        return found, rest

    def _refuse_in_vain(self, given: set[str], found: argparse.Namespace) -> None:
        """Exit with status 2 where an option is given without the one that it belongs to."""
        for option, (other, value) in self._needed.items():
            has = getattr(found, other.removeprefix("--").replace("-", "_"))
            there = has not in (None, False) if value is None else has == value
            if option in given and not there:
                asked = f"{other} {value}" if value else other
                self.error(f"{option} does nothing without {asked}: give {asked} or leave it out")

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and the message, whose middle is left out where it is very long."""
        if len(message) > LONGEST_MESSAGE:
            half = LONGEST_MESSAGE // 2
            message = f"{message[:half]} ... {message[-half:]}"
        super().error(message)

    def _spelt(self, word: str) -> str:
        """Returns the word with its option spelt as it was added."""
        if not word.startswith("--"):
            return word
        name, equals, value = word.partition("=")
        own = {one.replace("_", "-"): one for one in self._option_string_actions}
        field = "--" + name[2:].replace("-", "_")
        return own.get(name.replace("_", "-"), field) + equals + value
