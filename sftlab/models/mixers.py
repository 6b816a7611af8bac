"""Which modules mix tokens as attention does, and stop where a packed row begins?

Their convolutions and recurrences go through functions that `fastpath/packed_mixers.py` knows. For
every class named here, tests/test_packed_hybrids.py holds packed rows to rows alone.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from inspect import getclosurevars, isfunction
from types import ModuleType
from typing import Any

import torch
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
# tokens of a row on which kernels are tried: two chunks of the recurrences
TRIED = 128
# why a process has no kernels to try
NO_KERNELS = "a process has no package of kernels for them"
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
    replaced = [*_kernels(model)]
    leave_out_kernels(model)
    try:
        yield
    finally:
        for modeling, function, own in replaced:
            setattr(modeling, function, own)


def has_kernels(model: nn.Module) -> bool:
    """Returns whether a package of kernels computes mixers of a model."""
    return any(True for _ in _kernels(model))


def why_kernels_fail(model: nn.Module, dtype: torch.dtype, device: torch.device) -> str | None:
    """Returns why the kernels of a package do not train a model's mixers here; None if they do.

    A forward and a backward of one mixer of each class run on a short row, with products of
    `dtype`, on the `device` that trains: a copy of the mixer, where it is elsewhere.
    """
    for mixer in {type(one): one for one in packed_mixers(model)}.values():
        try:
            _train_on_a_row(mixer, model.config.get_text_config().hidden_size, dtype, device)
        except Exception as error:
            why = " ".join(str(error).split()) or type(error).__name__
            return f"{type(mixer).__name__} does not train with its package's kernels: {why}"
    return None


def leave_out_kernels(model: nn.Module) -> None:
    """Let mixers of a model compute in torch from now on."""
    for modeling, function, own in [*_kernels(model)]:
        setattr(modeling, function, _in_torch(own))


def _train_on_a_row(
    mixer: nn.Module, hidden: int, dtype: torch.dtype, device: torch.device
) -> None:
    parameter = next(mixer.parameters())
    if parameter.device != device:  # FSDP's model is on the CPU until it is sharded
        mixer = copy.deepcopy(mixer).to(device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, TRIED, hidden, generator=generator, device="cpu").to(device, dtype)
    casts = nullcontext() if parameter.dtype == dtype else torch.autocast(x.device.type, dtype)
    x.requires_grad_()
    gpus = [x.device] if x.is_cuda else []
    with torch.random.fork_rng(gpus), torch.enable_grad(), casts:
        found = mixer(x)
        found = found[0] if isinstance(found, tuple) else found
        torch.autograd.grad(found.float().sum(), x)


def _kernels(model: nn.Module) -> Iterator[tuple[ModuleType, str, Callable]]:
    """Yields the functions of transformers' modules that a package of kernels computes."""
    for name in {type(mixer).__module__ for mixer in packed_mixers(model)}:
        modeling = sys.modules[name]
        for function, own in list(vars(modeling).items()):
            of_padded_rows = getattr(own, "of_padded_rows", own)
            if isfunction(of_padded_rows) and is_kernel(of_padded_rows):
                yield modeling, function, own


def _in_torch(own: Callable) -> Callable:
    """Returns transformers' own function in torch, of one that a kernel computes."""
    return _closure(getattr(own, "of_padded_rows", own))["torch_function"]


def _closure(function: Callable) -> dict[str, Any]:
    """Returns the variables that transformers' wrapper of a function closes over."""
    return dict(getclosurevars(function).nonlocals)
