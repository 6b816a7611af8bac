"""The curves that a training writes for TensorBoard."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(run, tag="train/loss"):
    return [
        (e.step, e.value) for e in EventAccumulator(str(run / "tensorboard")).Reload().Scalars(tag)
    ]
