"""Two walks over all modules that a step makes, and need not.

A model with LoRA has more than a thousand modules. To tell each of them that it trains, and to look
for gradients in all, takes the host some hundredths of a step.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


@contextmanager
def short_walks(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Inside, the model's train() walks where a module does not train, zero_grad() over `groups`.

    These are the optimizer's, whose `params` are all that get a gradient. A copy of the model has
    the same of its own modules and parameters.
    """
    own = {
        "train": partial(_train, model, list(model.modules())),
        "zero_grad": partial(_zero_grad, model, groups),
    }
    before = {name: vars(model)[name] for name in own if name in vars(model)}
    vars(model).update(own)
    try:
        yield
    finally:
        for name, mine in own.items():
            if vars(model).get(name) is mine:  # captured steps have their own
                del vars(model)[name]
                vars(model).update({name: before[name]} if name in before else {})


def _train(model: nn.Module, modules: Sequence[nn.Module], mode: bool = True) -> nn.Module:
    if mode and all(module.training for module in modules):
        return model
    return type(model).train(model, mode)


def _zero_grad(
    model: nn.Module, groups: Sequence[Mapping[str, Any]], set_to_none: bool = True
) -> None:
    if not set_to_none:
        type(model).zero_grad(model, set_to_none)
        return
    for group in groups:
        for parameter in group["params"]:
            parameter.grad = None
