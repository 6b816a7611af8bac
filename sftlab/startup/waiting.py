"""Says what a long wait is for: one line on stdout, once the wait is longer than a few seconds."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

AFTER_S = 4.0


@contextmanager
def says_if_long(what: str, after_s: float = AFTER_S) -> Iterator[None]:
    """Print `what ...` when the block has taken `after_s` seconds, and its time once it is done.

    Rank 0 prints.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    began, said = time.monotonic(), threading.Event()

    def say() -> None:
        said.set()
        _say(f"{what} ...")

    timer = threading.Timer(after_s, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
    if said.is_set():
        _say(f"{what}: {time.monotonic() - began:.0f} s")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
