"""Which modules are an MLP that computes down(f(gate(x)) up(x)) and nothing else?"""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.functional import gelu, silu

from sftlab.models.without_numbers import NOT_WITHOUT_NUMBERS

NAMES = ("gate_proj", "up_proj", "down_proj")


def activation(x: torch.Tensor, tanh_gelu: bool) -> torch.Tensor:
    """Returns SiLU of x, or the tanh form of GELU."""
    return gelu(x, approximate="tanh") if tanh_gelu else silu(x)


def tanh_gelu_of(module: nn.Module) -> bool | None:
    """Returns whether the f of a gated MLP is the tanh form of GELU; it is SiLU otherwise.

    None where f is neither, and for what is no such MLP. Its linears are not looked at.
    """
    act = getattr(module, "act_fn", None)
    if not isinstance(act, nn.Module) or not _is_gated(type(module).forward):
        return None
    x = torch.linspace(-8, 8, 1000, dtype=torch.float64, device="cpu")
    for tanh_gelu in (False, True):
        if next(act.parameters(), None) is None and _same(act, x, activation(x, tanh_gelu)):
            return tanh_gelu
    return None


def gated_mlps(model: nn.Module) -> list[str]:
    """Returns the names of a model's gated MLPs whose three linears have no biases."""
    found = []
    for name, module in model.named_modules():
        linears = [getattr(module, one, None) for one in NAMES]
        plain = all(isinstance(one, nn.Linear) and one.bias is None for one in linears)
        if plain and tanh_gelu_of(module) is not None:
            found.append(name)
    return found


def _is_gated(forward: object) -> bool:
    """Whether a forward computes down(f(gate(x)) up(x)) and looks at nothing else."""
    x = torch.linspace(-8, 8, 1000, dtype=torch.float64, device="cpu")
    stand_in = SimpleNamespace(
        gate_proj=lambda x: x + 1,
        up_proj=lambda x: x - 2,
        down_proj=lambda x: x * 3,
        act_fn=torch.cos,
    )
    return _same(lambda x: forward(stand_in, x), x, torch.cos(x + 1) * (x - 2) * 3)


def _same(function: object, x: torch.Tensor, expected: torch.Tensor) -> bool:
    try:
        return torch.allclose(function(x), expected, rtol=1e-9, atol=1e-12)
    except NOT_WITHOUT_NUMBERS:
        return False
