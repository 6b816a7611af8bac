"""Gives each pytest-xdist worker its share of the cores, when imported.

What a worker starts inherits the share. Two workers whose trainings each take all cores would
stall one another.
"""

import os

ALL = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()

if "PYTEST_XDIST_WORKER" in os.environ and ALL:
    _number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    _workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    _cores = sorted(ALL)
    os.sched_setaffinity(0, _cores[_number::_workers] or [_cores[_number % len(_cores)]])
