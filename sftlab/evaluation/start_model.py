"""The model that a run started from: an earlier adapter, the reference of preference tuning."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from safetensors import SafetensorError

from sftlab.exit_messages import first_line
from sftlab.files import file_hash
from sftlab.models.trust import check_adapter
from sftlab.runs.record import RECORD
from sftlab.runs.run_directory import SIDES, START
from sftlab.schema import OBJECT, TEXT, check

_TRAINED = "default"  # peft's name of the run's own adapter


class Start(NamedTuple):
    """The adapter's folder, its weights' hash, and the directory of the run that trained it.

    `run` is None where the adapter is in no run directory.
    """

    adapter: Path
    weights: str
    run: Path | None


def start_of(folder: Path, run: dict[str, Any]) -> Start | None:
    """Returns what a run went on from; None where it began with a new adapter.

    Raises ValueError where that adapter is gone, or has changed since.
    """
    if not run.get("started_from"):
        return None
    where = str(folder / RECORD)
    check(run, where, {"started_from": OBJECT})
    check(run, where, {"started_from.adapter": TEXT, "started_from.weights": TEXT})
    adapter, then = Path(run["started_from"]["adapter"]), run["started_from"]["weights"]
    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(
            f"{folder} went on from the adapter in {adapter}, and {file} is not there: bring it "
            "back, or start where the training was started"
        )
    if (now := file_hash(file)[:16]) != then:
        raise ValueError(
            f"{folder} went on from the adapter in {adapter}, which has changed since (it was "
            f"{then} and is {now}): bring it back"
        )
    is_run = (adapter.parent / RECORD).is_file()
    return Start(adapter, then, adapter.parent if is_run else None)


def sides_of(start: Start | None) -> tuple[str, ...]:
    """Returns the names of the models that answer: base, the start if there is one, and tuned."""
    return SIDES if start is None else ("base", START, "tuned")


def load_start(model: PeftModel, start: Start) -> None:
    """Load the start's adapter beside the run's own, which stays the one that answers.

    Raises ValueError where it does not fit the run's base model.
    """
    check_adapter(start.adapter)
    try:
        model.load_adapter(str(start.adapter), adapter_name=START)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"the adapter in {start.adapter}, which the run went on from, does not load on its "
            f"base model: {first_line(error)}"
        ) from error
    finally:
        model.set_adapter(_TRAINED)
        model.eval()


@contextmanager
def start_answers(model: PeftModel) -> Iterator[None]:
    """Let the model answer as the run's start did. `load_start` comes before it."""
    model.set_adapter(START)
    try:
        yield
    finally:
        model.set_adapter(_TRAINED)
