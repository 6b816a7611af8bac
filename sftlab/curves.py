"""TensorBoard's curves of a run that was cut off: what lies beyond the checkpoint it continues from is taken out."""

from pathlib import Path

from sftlab.files import sync


def cut(folder: Path, step: int, saved: float) -> int:
    """Drop the events beyond `step`, and those of that step that came after it was `saved` (Unix time); how many.

    The continued run writes them again, so that a step stands in the curves once, whichever reader they have.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    dropped = 0
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        kept, part = [], path.with_name(f".{path.name}")
        for record in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(record)
            beyond = event.step > step or (event.step == step and event.wall_time > saved)
            dropped += beyond
            kept += [] if beyond else [record]
        with part.open("wb") as file:
            writer = RecordWriter(file)
            for record in kept:
                writer.write(record)
        sync(part)
        part.replace(path)
    return dropped
