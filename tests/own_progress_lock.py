"""Gives a forked process a lock of its own for progress bars.

tqdm's is a semaphore that all forks share: one that dies with it would stop the others. Each class
of progress bars may have one.
"""

import threading

from tqdm import tqdm


def take_own_progress_lock() -> None:
    """Give every class of progress bars one lock that no other process has."""
    lock, classes = threading.RLock(), [tqdm]
    while classes:
        one = classes.pop()
        one.set_lock(lock)
        classes += one.__subclasses__()
