"""The number that an answer comes to: those of GSM8K (Cobbe et al. 2021) end in `#### n`."""

import re
from decimal import Decimal

MARK = "####"
# a minus sign belongs to the number unless something is subtracted
_NUMBER = re.compile(r"(?<![\w.)])-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<![\w.])-?\$?\.\d+")


def final_number(text: str) -> Decimal | None:
    """Returns the number behind the last `####`, else the last number of a text; None without one.

    Signs of dollars and commas between thousands are left out.
    """
    _, mark, behind = text.rpartition(MARK)
    numbers = _NUMBER.findall(behind)
    if not numbers:
        return None
    found = numbers[0] if mark else numbers[-1]
    return Decimal(found.replace("$", "").replace(",", ""))


def marked_number(text: str) -> Decimal | None:
    """Returns the number behind the last `####` of a reference; None without one."""
    return final_number(text) if MARK in text else None
