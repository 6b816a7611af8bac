"""Which modules mix tokens as attention does, and stop where a packed row begins?

Their convolutions and recurrences go through functions that `fastpath/packed_mixers.py` knows. For
every class named here, tests/test_packed_hybrids.py holds packed rows to rows alone.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import getclosurevars, isfunction
from typing import Any

from torch import nn

# classes of transformers with one short convolution, and at most one recurrence behind it
PACKED = frozenset(
    (
        *("Lfm2ShortConv", "Lfm2MoeShortConv"),
        *("Qwen3NextGatedDeltaNet", "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet"),
        *("OlmoHybridGatedDeltaNet", "KimiLinearDeltaAttention"),
        *("BambaMixer", "FalconH1Mixer", "GraniteMoeHybridMambaLayer", "NemotronHMamba2Mixer"),
    )
)
# decoder layers of these compute each token by itself
TOKENWISE = frozenset(("NemotronHMLP", "NemotronHMoE"))


def packed_mixers(model: nn.Module) -> list[nn.Module]:
    """Returns the modules whose class has a packed form."""
    return [module for module in model.modules() if type(module).__name__ in PACKED]


def tokenwise_layers(model: nn.Module) -> int:
    """Returns how many decoder layers neither attend nor carry a state."""
    mixers = (getattr(module, "mixer", None) for module in model.modules())
    return sum(type(mixer).__name__ in TOKENWISE for mixer in mixers)


def is_kernel(function: Callable) -> bool:
    """Returns whether transformers found the package whose kernel this function stands for.

    Where transformers no longer says so, torch's own way is taken, which is right for both.
    """
    return bool(_closure(function).get("is_new_implementation"))


@contextmanager
def without_kernels(model: nn.Module) -> Iterator[None]:
    """Mixers of a model compute in torch while the context lasts, not by a package of kernels.

    A kernel takes the address of a tensor without numbers for memory, and ruins the GPU's context.
    """
    replaced = []
    for name in {type(mixer).__module__ for mixer in packed_mixers(model)}:
        modeling = sys.modules[name]
        for function, own in list(vars(modeling).items()):
            of_padded_rows = getattr(own, "of_padded_rows", own)
            if isfunction(of_padded_rows) and is_kernel(of_padded_rows):
                replaced.append((modeling, function, own))
                setattr(modeling, function, _closure(of_padded_rows)["torch_function"])
    try:
        yield
    finally:
        for modeling, function, own in replaced:
            setattr(modeling, function, own)


def _closure(function: Callable) -> dict[str, Any]:
    """Returns the variables that transformers' wrapper of a function closes over."""
    return dict(getclosurevars(function).nonlocals)
