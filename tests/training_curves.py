"""The curves that a training writes for TensorBoard."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(run, tag="train/loss"):
    """Step and value of each point of a curve, in the order in which its files were begun.

    TensorBoard reads files by name: the second, then the process number. A test may start twice
    within a second, in a process of a lower number.
    """
    files = [EventAccumulator(str(path)).Reload() for path in (run / "tensorboard").iterdir()]
    files.sort(key=lambda file: file.FirstEventTimestamp())
    held = (file.Scalars(tag) for file in files if tag in file.Tags()["scalars"])
    return [(event.step, event.value) for events in held for event in events]
