"""Do layers with fused LoRA compute what peft's do, on this device and with these kernels?"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from sftlab.fastpath.float8 import FrozenFloat8Linear
from sftlab.fastpath.lora_mlp import LoraMlp
from sftlab.fastpath.lora_products import LoraProduct, SharedInput, copy_matrices
from sftlab.fastpath.own_class import own_class

# Largest difference of equal outputs and gradients, relative to their norm.
SAME = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}
# The same of products in float8: h, A and B are rounded, and what is near another number's border.
SAME_IN_FLOAT8 = 0.2
# Tokens of the comparison: sizes for which a step compiles the kernels anyway.
TOKENS = 256


class _Part(NamedTuple):
    """Layers that read one tensor, or an MLP: its linears, and what computes its outputs."""

    name: str
    layers: tuple[LoraProduct, ...]
    mlp: LoraMlp | None

    @property
    def groups(self) -> list[SharedInput]:
        """What its linears' products are shared by."""
        return list(dict.fromkeys(layer.together for layer in self.layers))

    @property
    def kind(self) -> tuple:
        """What parts that need one comparison have in common."""
        sizes = [(*one.kind, one.out_features, one.base_layer.bias is None) for one in self.layers]
        scales = [one.scale for one in self.layers]
        of = [type(self.mlp), type(self.mlp.act_fn), self.mlp.tanh_gelu] if self.mlp else []
        return (*sizes, *scales, *of, *(one.far for one in self.groups), self.like.device)

    @property
    def most(self) -> float:
        """The largest difference of what is the same; a GPU may round float32 to TF32."""
        if self.layers[0].together.in_float8:
            return SAME_IN_FLOAT8
        tf32 = self.like.dtype == torch.float32 and self.like.is_cuda
        return SAME[torch.float16 if tf32 else self.like.dtype]

    @property
    def like(self) -> torch.Tensor:
        """A number with the dtype and device of its products."""
        first = self.layers[0]
        return torch.empty((), dtype=first.together.dtype, device=first.base_layer.weight.device)

    def outputs(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Returns what its modules make of x [1, tokens, in]."""
        return [self.mlp(x)] if self.mlp else [layer(x) for layer in self.layers]


def differs(model: nn.Module) -> str | None:
    """Returns how fused layers differ from peft's; None where outputs and gradients are the same.

    One part of each kind is compared: an MLP, and linears that read one tensor. B is zero when a
    training begins, so random matrices stand for A and B meanwhile. The model and all random states
    are as before then. Layers must not be compiled yet.
    """
    parts: dict[tuple, _Part] = {}
    for part in _parts(model):
        parts.setdefault(part.kind, part)
    for part in parts.values():
        most, (apart, where) = part.most, _largest_difference(part)
        if not apart <= most:
            return (
                f"{part.name} computes something else than peft's layers ({where} is {apart:.1%} "
                f"apart, expected at most {most:.1%})"
            )
    return None


def _parts(model: nn.Module) -> Iterator[_Part]:
    within: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, LoraMlp):
            layers = (module.gate_proj, module.up_proj, module.down_proj)
            within.update(layers)
            yield _Part(name, layers, module)
    for name, module in model.named_modules():
        if isinstance(module, LoraProduct) and module not in within:
            within.update(module.together.layers)
            yield _Part(name, module.together.layers, None)


def _largest_difference(part: _Part) -> tuple[float, str]:
    """Returns the largest difference relative to peft's norm, and what has it."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu")

    like, first = part.like, part.layers[0]
    x = drawn(1, TOKENS, first.in_features).to(like).requires_grad_()
    ends = [part.layers[-1]] if part.mlp else part.layers
    given = [drawn(1, TOKENS, one.out_features) * TOKENS**-0.5 for one in ends]
    given = [one.to(like) for one in given]
    matrices = [matrix for layer in part.layers for matrix in layer.matrices]
    named = [f"the gradient of {which}" for _ in part.layers for which in "AB"]
    names = [*("the output" for _ in given), "the gradient of the input", *named]
    with _random(part, drawn), _casting(matrices[0], like), torch.enable_grad():
        with _as_peft(part):
            right = _computed(part.outputs, x, given, matrices)
        copy_matrices(part.groups)
        found = _computed(part.outputs, x, given, matrices)
    differences = [
        (_apart(one, other), name) for name, one, other in zip(names, found, right, strict=True)
    ]
    return max(differences, key=lambda one: (math.isnan(one[0]), one[0]))


def _apart(found: torch.Tensor, right: torch.Tensor) -> float:
    """Returns how far `found` is from `right`, relative to its norm; 0 where they are equal."""
    apart = (found.double() - right.double()).norm()
    return float(apart / right.double().norm()) if apart else 0.0


def _computed(
    outputs: Callable[[torch.Tensor], list[torch.Tensor]],
    x: torch.Tensor,
    given: Sequence[torch.Tensor],
    matrices: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """Returns outputs and gradients; no parameter gets one, so nobody's hook hears of it."""
    made = outputs(x)
    gradients = torch.autograd.grad(made, [x, *matrices], [one.to(made[0]) for one in given])
    return [*(one.detach() for one in made), *gradients]


@contextmanager
def _random(part: _Part, drawn: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Let random matrices stand for A and B, without dropout; then all is as before."""
    own = {one: one.data for layer in part.layers for one in layer.matrices}
    weights = {layer.base_layer.weight: layer.base_layer.weight.data for layer in part.layers}
    held = {group: group.held for group in part.groups}
    training = {one: one.training for layer in part.layers for one in layer.modules()}
    try:
        for layer in part.layers:
            a, b = layer.matrices  # an update as large as the product that it adds to
            spread = float(_some_weights(layer.base_layer).std()) or 1.0
            large = spread * (layer.in_features / layer.rank) ** 0.5 / (layer.scale or 1.0)
            a.data = (drawn(*a.shape) * layer.in_features**-0.5).to(a)
            b.data = (drawn(*b.shape) * large).to(b)
        for one in training:
            one.training = False
        yield
    finally:
        for parameter, data in own.items():
            parameter.data = data
        for one, was in training.items():
            one.training = was
        for group, was in held.items():
            group.forget(weights)
            group.held = was


def _some_weights(linear: nn.Module) -> torch.Tensor:
    if isinstance(linear, FrozenFloat8Linear):
        weight, _, scale = linear.stored()
        return weight[:256].float() * scale[0, 0]
    return dequantize_module_weight(linear)[:256].float()


@contextmanager
def _as_peft(part: _Part) -> Iterator[None]:
    """Let a part's modules have the classes that they had before they were fused."""
    fused = {module: type(module) for module in part.layers}
    if part.mlp:
        fused[part.mlp] = type(part.mlp)
    try:
        for module in part.layers:
            module.__class__ = own_class(module)
        if part.mlp:
            part.mlp.__class__ = own_class(part.mlp)
        yield
    finally:
        for module, of in fused.items():
            module.__class__ = of


def _casting(a: torch.Tensor, like: torch.Tensor) -> AbstractContextManager:
    """Returns a context in which products have the weights' dtype, as in a step."""
    if a.dtype == like.dtype:
        return nullcontext()
    return torch.autocast(like.device.type, like.dtype, cache_enabled=False)
