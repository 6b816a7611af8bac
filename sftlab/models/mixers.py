"""Which modules mix tokens as attention does, and stop where a packed row begins?

Their convolutions and recurrences go through functions that `fastpath/packed_mixers.py` knows. For
every class named here, tests/test_packed_hybrids.py holds packed rows to rows alone.
"""

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
