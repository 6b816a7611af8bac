"""The order in which test files run, and which of them share a worker."""

from pathlib import Path

import pytest

# Files that take the longest come first, so that the workers end together. One of the first four
# trains the run that most of the others look at, in a minute; the other three do not wait for it.
SLOWEST_FIRST = (
    *("demo", "browser", "harness_refusals", "compiled", "interpreted_kernels", "pace"),
    *("harness", "quality", "continuation", "sft", "app", "report", "plan", "tokens"),
    *("fsdp", "faults", "study", "significance", "step_memory", "fuzz", "families"),
    *("reference", "tokenizing", "fastpath", "chat"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        starts = [name.startswith(first) for first in SLOWEST_FIRST]
        return starts.index(True) if any(starts) else len(starts)

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Tests of a file share a worker, and so do all that talk to the running app."""
    from xdist.scheduler.loadfile import LoadFileScheduling

    class AppTogether(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "app" if Path(file).stem.startswith(("test_app", "test_browser")) else file

    return AppTogether(config, log)
