"""The number that an answer comes to: those of GSM8K (Cobbe et al. 2021) end in `#### n`."""

import re
from decimal import Decimal

MARK = "####"
# a minus sign belongs to the number unless something is subtracted
_NUMBER = re.compile(r"(?<![\w.)])-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<![\w.])-?\$?\.\d+")

# a number that goes on: a fraction, an exponent, a space between thousands
_OTHERWISE = re.compile(r"\d\s*/\s*\d|\d[eE^]|\d\s+\d")


def final_number(text: str) -> Decimal | None:
    """Returns the number behind the last `####`, else the last number of a text; None without one.

    A `####` with nothing behind it does not count. Signs of dollars and commas between thousands
    are left out.
    """
    text = text.replace("\u2212", "-").rstrip().removesuffix(MARK)
    _, mark, behind = text.rpartition(MARK)
    numbers = _NUMBER.findall(behind)
    if not numbers:
        return None
    found = numbers[0] if mark else numbers[-1]
    return Decimal(found.replace("$", "").replace(",", ""))


def marked_number(text: str) -> Decimal | None:
    """Returns the number behind the last `####` of a reference; None without one.

    None too for what this cannot read as one number: `1/2`, `1e3`, `1 000`.
    """
    _, mark, behind = text.replace("\u2212", "-").rpartition(MARK)
    known = mark and len(_NUMBER.findall(behind)) == 1 and not _OTHERWISE.search(behind)
    return final_number(text) if known else None
