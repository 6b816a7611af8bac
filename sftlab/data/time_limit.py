"""Limits for Python code that may never end, such as a chat template; they work in any thread."""

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType


class TooSlow(ValueError):
    """The code ran longer than it may."""


class _Interrupt(BaseException):
    """Raised inside the slow code; no `except Exception` of its own stops it."""


@contextmanager
def call_limit(seconds: float, function: Callable, what: str) -> Iterator[None]:
    """Raise TooSlow, which names `what`, once one call of `function` has run for `seconds`.

    `function` is one in Python that is called within, however deep and however often. The thread's
    stack is looked at a few times in those seconds, so that the calls themselves cost nothing.
    """
    ended = threading.Event()
    thread, code = threading.get_ident(), function.__code__

    def watch() -> None:
        call, since = None, 0.0
        while not ended.wait(seconds / 8):
            now = _call_of(code, sys._current_frames().get(thread))
            if now is not call:
                call, since = now, time.monotonic()
            elif call is not None and time.monotonic() - since >= seconds:
                _interrupt(thread)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except _Interrupt as error:
        raise TooSlow(f"{what} takes longer than {seconds:g} s") from error
    finally:
        ended.set()
        watcher.join()


def _call_of(code: CodeType, frame: FrameType | None) -> FrameType | None:
    """Returns the innermost frame of a function on a stack; None where it is not called."""
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def _interrupt(thread: int) -> None:
    identity, raised = ctypes.c_ulong(thread), ctypes.py_object(_Interrupt)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(identity, raised)


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise TooSlow, which names `what`, once the code within has run for `seconds`.

    Only code in Python is interrupted; one call into C runs to its end.
    """
    lock, state = threading.Lock(), {"over": False}
    thread = threading.get_ident()

    def interrupt() -> None:
        with lock:
            if not state["over"]:
                state["over"] = True
                _interrupt(thread)

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
