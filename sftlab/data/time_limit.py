"""A limit for Python code that may never end, such as a chat template; it works in any thread."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TooSlow(ValueError):
    """The code ran longer than it may."""


class _Interrupt(BaseException):
    """Raised inside the slow code; no `except Exception` of its own stops it."""


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise TooSlow, which names `what`, once the code within has run for `seconds`.

    Only code in Python is interrupted; one call into C runs to its end.
    """
    lock, state = threading.Lock(), {"over": False}
    thread = ctypes.c_ulong(threading.get_ident())

    def interrupt() -> None:
        with lock:
            if not state["over"]:
                state["over"] = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_Interrupt))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
        with lock:
            late, state["over"] = state["over"], True
        if late:  # it ended just as the time was up
            for _ in range(1_000_000):
                pass
    except _Interrupt as error:
        raise TooSlow(f"{what} takes longer than {seconds:g} s") from error
    finally:
        with lock:
            state["over"] = True
        timer.cancel()
