"""Trains micro-batches by replaying recorded steps, after a comparison with a plain one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sftlab.fastpath.captured_step import (
    CapturedSteps,
    NotCaptured,
    StaticGradients,
    compare,
    random_state,
    set_random_state,
)
from sftlab.fastpath.cuda_graphs import CudaGraphs

# what a step reads of a batch, beside the number of tokens in the loss of the global batch
INPUTS = ("input_ids", "position_ids", "tiles", "loss_positions", "targets", "in_loss")
_IN_GLOBAL_BATCH = "in_global_batch"

# returns loss and sums [n] of a batch, from the model and the tokens of the global batch
Loss = Callable[[nn.Module, dict[str, Any], torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class StepCapture:
    """Replays steps of one model; `loss` and `backward` are what is recorded.

    The first micro-batch is also trained on without a recording. Where that gives another loss or
    other gradients, NotCaptured says so, and nothing has changed. `off` is why steps are plain for
    good, after `end`.
    """

    def __init__(self, loss: Loss, backward: Callable[[torch.Tensor], object]) -> None:
        self._loss, self._backward = loss, backward
        self._steps: CapturedSteps | None = None
        self._model: nn.Module | None = None
        self.off: str | None = None

    def run(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        in_global_batch: torch.Tensor,
        trained: Sequence[nn.Parameter],
        plain: Callable[[], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Train on a micro-batch; returns its loss and sums. Raises NotCaptured.

        `plain` does the same without a recording and returns the loss; it runs before the first
        step, and is undone. Gradients are added to those of the parameters in `trained`.
        """
        batch = {name: inputs[name] for name in INPUTS}
        # a graph would keep the value of a number that is on the host
        device = inputs["input_ids"].device
        batch[_IN_GLOBAL_BATCH] = torch.as_tensor(in_global_batch, device=device)
        if self._steps is None:
            self._steps = self._verified(model, batch, trained, plain)
            # Gradients stay where they are. And no step looks for parameters among all modules.
            self._model, model.zero_grad = model, self._zero_grad
        if not model.training:
            model.train()
        results = self._steps.run(batch)
        return results[0], results[1:]

    def _verified(
        self,
        model: nn.Module,
        batch: dict[str, torch.Tensor],
        trained: Sequence[nn.Parameter],
        plain: Callable[[], torch.Tensor],
    ) -> CapturedSteps:
        drawn = random_state(batch["input_ids"].device)
        try:
            loss = plain()
            without = sum(one.grad is None for one in trained)
            if without:
                raise NotCaptured(f"{without} of {len(trained)} trained tensors get no gradient")
            gradients = StaticGradients(trained)
            gradients.attach()
            expected = gradients.clone()
            gradients.zero()
            set_random_state(drawn)
            steps = CapturedSteps(lambda static: self._step(model, static), gradients, CudaGraphs())
            found = steps.run(batch)
            compare(loss.float().reshape(1), expected, found, gradients.clone())
        finally:
            set_random_state(drawn)
            model.zero_grad()
        gradients.attach()
        return steps

    def _step(self, model: nn.Module, static: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns loss and sums [1 + n] of a forward and backward over tensors alone."""
        inputs = {name: static[name] for name in INPUTS}
        loss, sums = self._loss(model, inputs, static[_IN_GLOBAL_BATCH])
        self._backward(loss)
        return torch.cat([loss.detach().float().reshape(1), sums.detach().float()])

    def _zero_grad(self, set_to_none: bool = True) -> None:
        """What `zero_grad` of the model is while steps are recorded."""
        self._steps.gradients.zero()

    def end(self, why: str) -> None:
        """Drop all recordings; steps are plain from now on, and gradients are the model's own."""
        self.off = why
        if self._model is not None:
            del self._model.zero_grad
        if self._steps is not None:
            self._steps.forget()
        self._steps = self._model = None

    def facts(self) -> dict[str, Any]:
        """Returns how many recordings were made and how many micro-batches had none, or `off`."""
        if self.off or self._steps is None:
            return {"off": self.off or "there was no step"}
        return {"recordings": self._steps.captures, "plain_micro_batches": self._steps.plain}
