"""How many CPU cores may this process use?"""

import os


def cpu_cores() -> int:
    """Returns the cores that this process may use; where the system does not say, all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
