"""TensorBoard curves of a continued run, with every value up to the checkpoint exactly once."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sftlab.files import sync


def restore(
    folder: Path,
    history: Sequence[Mapping[str, Any]],
    step: int,
    saved: float,
    files: Iterable[Path] | None = None,
) -> int:
    """Restore the curves to their state at the checkpoint of `step`, saved at `saved` (Unix time).

    `files` are the run's own; without them, all that are in `folder`.

    Later values are dropped, because the continued run logs them again. Where values of `history`
    (transformers' log_history) are missing, the files are written anew from it. Returns how many
    were missing.
    """
    from torch.utils.tensorboard import SummaryWriter

    times: dict[tuple[str, int], float] = {}
    own = sorted(folder.rglob("events.out.tfevents.*") if files is None else files)
    for path in own:
        times |= _cut(path, step, saved)
    figures = list(_figures(history))
    lost = sum((tag, at) not in times for tag, at, _ in figures)
    if lost:
        for path in own:
            path.unlink()
        with SummaryWriter(str(folder)) as writer:
            for tag, at, value in figures:
                writer.add_scalar(tag, value, at, walltime=times.get((tag, at), saved))
    return lost


def _figures(history: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, int, float]]:
    from transformers.integrations.integration_utils import rewrite_logs

    for entry in history:
        logged = rewrite_logs({name: value for name, value in entry.items() if name != "step"})
        yield from (
            (tag, entry["step"], value)
            for tag, value in logged.items()
            if isinstance(value, int | float)
        )


def _cut(path: Path, step: int, saved: float) -> dict[tuple[str, int], float]:
    """Drop the events after the checkpoint, and all from the first unreadable one.

    Returns the time of each value that is left, by tag and step.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    times, kept, part = {}, [], path.with_name(f".{path.name}")
    for record in RawEventFileLoader(str(path)).Load():
        event = Event.FromString(record)
        if event.step < step or (event.step == step and event.wall_time <= saved):
            kept.append(record)
            times |= {(value.tag, event.step): event.wall_time for value in event.summary.value}
    with part.open("wb") as file:
        writer = RecordWriter(file)
        for record in kept:
            writer.write(record)
    sync(part)
    part.replace(path)
    return times
