"""Checkpointed layers whose recomputation leaves random numbers alone, so that it can be recorded.

torch saves the state of the random numbers before a checkpointed layer and sets it before the layer
runs again. Neither can be recorded, and neither is needed where nothing draws a random number.
"""

from collections.abc import Iterator
from functools import partial

from torch import nn
from transformers import PreTrainedConfig

_FUNCTION = "_gradient_checkpointing_func"  # what transformers calls a checkpointed layer with
_KEEPS = "preserve_rng_state"


class RecomputedLayers:
    """The checkpointed layers of a model; `leave_random_numbers` until `undo`."""

    def __init__(self, model: nn.Module) -> None:
        self._functions = list(_checkpointed(model))

    @property
    def any(self) -> bool:
        """Whether there are checkpointed layers."""
        return bool(self._functions)

    @property
    def reentrant(self) -> bool:
        """Whether the recomputation runs a backward within the backward."""
        return any(one.keywords.get("use_reentrant") is not False for _, one in self._functions)

    def leave_random_numbers(self) -> None:
        """Neither save nor set the state of the random numbers."""
        for layer, function in self._functions:
            setattr(layer, _FUNCTION, partial(function, **{_KEEPS: False}))

    def undo(self) -> None:
        """Checkpoint the layers as before."""
        for layer, function in self._functions:
            setattr(layer, _FUNCTION, function)


def _checkpointed(model: nn.Module) -> Iterator[tuple[nn.Module, partial]]:
    for layer in model.modules():
        function = vars(layer).get(_FUNCTION)
        if getattr(layer, "gradient_checkpointing", False) and isinstance(function, partial):
            yield layer, function


def dropout_in(config: PreTrainedConfig) -> str | None:
    """Returns the first field of a model's config that is a dropout above 0, with its value."""
    found = config.get_text_config().to_dict().items()
    numbers = ((k, v) for k, v in found if "drop" in k and isinstance(v, int | float) and v > 0)
    return next((f"{name} {value:g}" for name, value in numbers), None)
