"""Experts with LoRA on their stacked weights, without a second copy of them.

peft adds B A to the weights of all experts in every forward, and keeps the sum for the backward.
Here each token goes through the matrices of its own experts: x W_e^T + s (x A_e^T) B_e^T. Products
are grouped, or one expert's after the other's, as sftlab/fastpath/experts.py chose for W.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from peft.tuners import lora
from torch import nn
from torch.nn import functional

from sftlab.fastpath.experts import ALIGNED, ONE_BY_ONE


class Factors(NamedTuple):
    """A and B of each expert, and the factor of their update.

    `a` is [experts, rank, in], `b` [experts, rank, out].
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float


class ParamWrapper(lora.ParamWrapper):
    """peft's LoRA on the weights of experts, which multiplies A and B instead of adding them to W.

    It is the outermost of the wrappers around one module. It falls back to peft's own forward while
    adapters are merged, disabled, several or none, and where a hook looks at the experts. peft
    finds its wrappers by the name of this class.
    """

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """Returns what the experts return."""
        experts = self.get_base_layer()
        watched = experts._forward_hooks or experts._forward_pre_hooks
        factors = None if watched or "adapter_names" in kwargs else self.factors()
        if factors is None:
            return lora.ParamWrapper.forward(self, x, *args, **kwargs)
        one_by_one = experts.config._experts_implementation == ONE_BY_ONE
        forward = _uncompiled_forward if one_by_one else _forward
        return forward(experts, factors, one_by_one, x, *args, **kwargs)

    def factors(self) -> dict[str, Factors] | None:
        """Returns the factors by the name of their weight; None where peft must add them up."""
        found, transposed = {}, self.get_base_layer().is_transposed
        for layer in wrappers(self):
            active = [name for name in layer.active_adapters if name in layer.lora_A]
            if layer.disable_adapters or layer.merged or len(active) != 1:
                return None
            left, right, scale = layer.get_delta_factors(active[0])
            pair = (left.mT, right) if transposed else (right, left.mT)
            found[layer.parameter_name] = Factors(*pair, scale)
        return found


def wrappers(outermost: nn.Module) -> Iterator[lora.ParamWrapper]:
    """Yields peft's wrappers around one module, from the outside."""
    layer = outermost
    while isinstance(layer, lora.ParamWrapper):
        yield layer
        layer = layer.base_layer


def _forward(
    experts: nn.Module,
    factors: dict[str, Factors],
    one_by_one: bool,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Returns what experts with LoRA make of [tokens, hidden].

    `top_k_index` and `top_k_weights` [tokens, taken] are the experts of each token. The steps are
    those of transformers' grouped_mm_experts_forward.
    """
    taken, device = top_k_index.shape[-1], hidden_states.device
    of, order = torch.sort(top_k_index.reshape(-1))
    counted = of.float() if device.type == "cpu" else of.int()  # what histc takes
    counts = torch.histc(counted, bins=experts.num_experts, min=0, max=experts.num_experts - 1)
    if one_by_one:
        product = partial(_one_by_one, counts.int().tolist())
    else:
        product = partial(_grouped, counts.cumsum(0, dtype=torch.int32))
        idle = (counts == 0)[:, None, None]
        factors = {name: _for_kernels(one, idle) for name, one in factors.items()}
    x = hidden_states[order // taken]
    x = _linear(experts, "gate_up_proj" if experts.has_gate else "up_proj", factors, product, x, of)
    x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
    x = _linear(experts, "down_proj", factors, product, x, of)
    if getattr(experts, "has_post_expert_norm", False):  # older releases know none
        x = experts.post_expert_norm(x)
    x = x * top_k_weights.reshape(-1)[order, None]
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=device)
    return x[place].view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)


# the host reads how many tokens an expert has
_uncompiled_forward = torch.compiler.disable(
    _forward, reason="experts are multiplied one after the other"
)


def _linear(
    experts: nn.Module,
    name: str,
    factors: dict[str, Factors],
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    of: torch.Tensor,
) -> torch.Tensor:
    """Returns x times the weights of its experts, with LoRA and bias; row i is of expert of[i]."""
    weight = getattr(experts, name)
    y = product(x, weight if experts.is_transposed else weight.mT)
    if name in factors:
        a, b, scale = factors[name]
        y = y + product(product(x, a.mT) * scale, b)
    return y + getattr(experts, f"{name}_bias")[of] if experts.has_bias else y


def _for_kernels(factors: Factors, idle: torch.Tensor) -> Factors:
    """Returns factors whose rank and layout the grouped product takes.

    `idle` [experts, 1, 1] are experts without tokens. On some GPUs these get a gradient (pytorch's
    issue 172439), and here they get none.
    """
    a, b, scale = factors
    if missing := -a.shape[1] % ALIGNED:
        a, b = (functional.pad(one, [0, 0, 0, missing]) for one in (a, b))
    return Factors(*(_dense(one.masked_fill(idle, 0)) for one in (a, b)), scale)


@torch.library.custom_op("sftlab::dense", mutates_args=())
def _dense(matrices: torch.Tensor) -> torch.Tensor:
    """Returns a contiguous copy. Compiled layers could choose a layout that no kernel takes."""
    return matrices.clone(memory_format=torch.contiguous_format)


@_dense.register_fake
def _(matrices: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(matrices, memory_format=torch.contiguous_format)


_dense.register_autograd(lambda ctx, gradient: gradient)


def _grouped(ends: torch.Tensor, x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    return functional.grouped_mm(x.to(matrices.dtype), matrices, offs=ends)


def _one_by_one(counts: list[int], x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    # `unbind` has one gradient for all experts, where indexing would have one as large for each
    each = zip(x.split(counts), matrices.unbind(), strict=True)
    return torch.cat([rows @ matrix for rows, matrix in each if len(rows)])
