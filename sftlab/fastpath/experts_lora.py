"""Which experts with LoRA are computed without a merged copy of their weights?"""

import torch
from peft.tuners import lora
from torch import nn

from sftlab.fastpath.experts_products import ParamWrapper, wrappers

FACTORED, MERGED = "factored", "merged"
# what transformers says of a class of experts whose product can be chosen
_SAID = ("is_transposed", "has_gate", "has_bias", "_apply_gate")
_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
# Largest difference of equal outputs, relative to their norm.
SAME = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}
# Tokens of the comparison with peft, and the experts that each visits.
_PROBE = (64, 2)


def take_experts_lora(model: nn.Module) -> tuple[str | None, str | None]:
    """Let LoRA on experts go without a merged copy of their weights, where that is peft's update.

    Returns what is taken, None where no experts have LoRA, and why some stay peft's. The weights
    are not sharded yet.
    """
    layers = adapted_experts(model)
    if not layers:
        return None, None
    left = factor_experts(model)
    for alike in _of_a_kind(model):
        if why := differs(alike[0]):
            left[why] = left.get(why, 0) + len(alike)
            for layer in alike:
                layer.__class__ = lora.ParamWrapper
    reason = "; ".join(
        f"{count} of {len(layers)} modules of experts: {why}" for why, count in left.items()
    )
    taken = MERGED if sum(left.values()) == len(layers) else FACTORED
    return taken, f"for {reason}" if reason else None


def factor_experts(model: nn.Module) -> dict[str, int]:
    """Let LoRA on experts that are understood go without a merged copy, in place.

    Parameters, their names and what peft saves stay as they are. Returns how many modules of
    experts stay on peft's path, by reason.
    """
    left: dict[str, int] = {}
    for layer in adapted_experts(model):
        if reason := why_not(layer):
            left[reason] = left.get(reason, 0) + 1
        else:
            layer.__class__ = ParamWrapper
    return left


def adapted_experts(model: nn.Module) -> list[lora.ParamWrapper]:
    """Returns the outermost wrapper around each module whose stacked weights have LoRA."""
    return [o for o in _outermost(model) if any(one.get_param().ndim == 3 for one in wrappers(o))]


def keep_peft_uncompiled(model: nn.Module) -> None:
    """Leave to the interpreter what peft does where it adds LoRA to parameters, in place.

    It makes a class of the module in every forward, and each would be compiled anew.
    """
    for layer in _outermost(model):
        if not isinstance(layer, ParamWrapper):
            layer.forward = torch.compiler.disable(
                layer.forward, reason="peft adds LoRA to parameters in every forward"
            )


def _outermost(model: nn.Module) -> list[lora.ParamWrapper]:
    found = [one for one in model.modules() if isinstance(one, lora.ParamWrapper)]
    inner = {one.base_layer for one in found}
    return [one for one in found if one not in inner]


def why_not(layer: lora.ParamWrapper) -> str | None:
    """Returns why peft must add LoRA to the weights of these experts; None if it need not."""
    experts = layer.get_base_layer()
    name = type(experts).__name__
    if any(not hasattr(experts, one) for one in _SAID) or "forward" in vars(experts):
        return f"{name} has a product of its own"
    if getattr(experts, "_is_expert_parallel", False):
        return "the experts are spread over processes"
    for one in wrappers(layer):
        weight = one.get_param()
        if one.parameter_name not in _WEIGHTS or weight.ndim != 3 or one.num_experts == 1:
            return f"{one.parameter_name} of {name} are not the weights of several experts"
        if weight.dtype not in SAME:
            return f"the weights are {weight.dtype}"
    return None


def _of_a_kind(model: nn.Module) -> list[list[ParamWrapper]]:
    """Returns the layers that were taken over, those of one class and one size together."""
    kinds: dict[tuple, list[ParamWrapper]] = {}
    for layer in adapted_experts(model):
        if isinstance(layer, ParamWrapper):
            sizes = [(w.parameter_name, w.get_param().shape, w.r.items()) for w in wrappers(layer)]
            kinds.setdefault((type(layer.get_base_layer()), str(sizes)), []).append(layer)
    return list(kinds.values())


@torch.no_grad()
def differs(layer: ParamWrapper) -> str | None:
    """Returns how the experts' outputs differ from peft's; None where they are the same.

    B is zero when a training begins, so random matrices stand for A and B meanwhile. peft makes its
    merged copy of this one module.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    experts, matrices = layer.get_base_layer(), {}
    weight = experts.gate_up_proj if experts.has_gate else experts.up_proj
    width = weight.shape[1 if experts.is_transposed else 2]
    given = (
        drawn(_PROBE[0], width).to(weight),
        drawn(_PROBE[0], len(weight)).argsort(1)[:, : _PROBE[1]].to(weight.device),
        drawn(*_PROBE).sigmoid().to(weight),
    )
    for one in wrappers(layer):
        spread = float(one.get_param()[0].float().std())
        for name, a in one.lora_A.items():  # an update as large as the product that it adds to
            b, rank = one.lora_B[name], one.r[name]
            large = spread * (a.in_features / rank) ** 0.5 / one.scaling[name]
            matrices[a.weight] = drawn(*a.weight.shape) * a.in_features**-0.5
            matrices[b.weight] = drawn(*b.weight.shape) * large
    own = {parameter: parameter.data for parameter in matrices}
    try:
        for parameter, matrix in matrices.items():
            parameter.data = matrix.to(parameter)
        right = lora.ParamWrapper.forward(layer, *given).float()
        found = layer(*given).float()
    finally:
        for parameter, data in own.items():
            parameter.data = data
    apart = float((found - right).norm() / right.norm())
    if apart <= SAME[weight.dtype]:
        return None
    return f"{type(experts).__name__} computes other values without the copy ({apart:.1%} apart)"
