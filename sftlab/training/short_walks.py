"""Two walks over all modules that a step makes, and need not.

A model with LoRA has more than a thousand modules. To tell each of them that it trains, and to look
for gradients in all, takes the host some hundredths of a step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def short_walks(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, the model's train() walks where a module does not train, zero_grad() over `trained`.

    No other parameter of the model gets a gradient.
    """
    modules = list(model.modules())

    def train(mode: bool = True) -> nn.Module:
        if mode and all(module.training for module in modules):
            return model
        return type(model).train(model, mode)

    def zero_grad(set_to_none: bool = True) -> None:
        if not set_to_none:
            type(model).zero_grad(model, set_to_none)
        for parameter in trained:
            parameter.grad = None if set_to_none else parameter.grad

    model.train, model.zero_grad = train, zero_grad
    try:
        yield
    finally:
        for name in ("train", "zero_grad"):
            vars(model).pop(name, None)
