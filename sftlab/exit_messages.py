"""How a script ends after a user's mistake: one line on stderr and an exit status, no traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def mistakes_in_one_line(*others: type[Exception]) -> Iterator[None]:
    """End the script with `error: ...` and exit status 1 after a ValueError, or one of `others`.

    Raises SystemExit, whose message Python prints on stderr.
    """
    try:
        yield
    except (ValueError, *others) as error:
        sys.exit(f"error: {error}")
