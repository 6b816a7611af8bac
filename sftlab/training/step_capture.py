"""Trains micro-batches by replaying recorded steps, after a comparison with a plain one."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
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
from sftlab.fastpath.recomputed_layers import RecomputedLayers
from sftlab.training.shared_capture import (
    SharedCapture,
    averages_now,
    averaging,
    together,
    without_ddp,
)

# what a step reads of a batch, beside the number of tokens in the loss of the global batch
INPUTS = ("input_ids", "position_ids", "tiles", "loss_positions", "targets", "in_loss")
_IN_GLOBAL_BATCH = "in_global_batch"

# returns loss and sums [n] of a batch, from the model and the tokens of the global batch
Loss = Callable[[nn.Module, dict[str, Any], torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class StepCapture:
    """Replays steps of one model; `loss` and `backward` are what is recorded.

    The first micro-batch is also trained on without a recording. Where that gives another loss or
    other gradients, NotCaptured says so, and nothing has changed. `off` is why steps are plain for
    good, after `end`. Under DDP every process records its own micro-batches, and gradients are
    averaged where DDP would do so; if one process has to end that, NotCaptured says so in all.
    """

    def __init__(self, loss: Loss, backward: Callable[[torch.Tensor], object]) -> None:
        self._loss, self._backward = loss, backward
        self._recorder, self._shared = CudaGraphs(), SharedCapture()
        self._steps: CapturedSteps | None = None
        self._model: nn.Module | None = None
        self._layers: RecomputedLayers | None = None
        self.off: str | None = None

    def wrapping(self) -> AbstractContextManager[None]:
        """Inside, DDP is wrapped around the model that is recorded later."""
        return self._recorder.on_its_stream()

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
        self._shared.go_on()
        batch = {name: inputs[name] for name in INPUTS}
        # a graph would keep the value of a number that is on the host
        device = inputs["input_ids"].device
        batch[_IN_GLOBAL_BATCH] = torch.as_tensor(in_global_batch, device=device)
        if self._steps is None:
            self._layers = RecomputedLayers(model)
            self._layers.leave_random_numbers()
            self._steps = self._verified(model, batch, trained, plain)
            # Gradients stay where they are. And no step looks for parameters among all modules.
            self._model, model.zero_grad = model, self._zero_grad
        if not model.training:
            model.train()
        results = self._results(model, batch)
        if averages_now(model):
            self._shared.average(self._steps.gradients)
        return results[0], results[1:]

    def _results(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if self._shared.problem is None:
            try:
                return self._steps.run(batch)
            except NotCaptured as error:
                if without_ddp(model) is model:
                    raise
                self._shared.problem = str(error)
                self._steps.forget()
        return self._steps.run_plain(batch)

    def _verified(
        self,
        model: nn.Module,
        batch: dict[str, torch.Tensor],
        trained: Sequence[nn.Parameter],
        plain: Callable[[], torch.Tensor],
    ) -> CapturedSteps:
        inner, drawn = without_ddp(model), random_state(batch["input_ids"].device)

        def begun() -> tuple[CapturedSteps, list[torch.Tensor], torch.Tensor]:
            """Steps, the gradients of the plain one, and the results of the first recorded one."""
            self._check_recomputation(drawn, batch)
            without = sum(one.grad is None for one in trained)
            if without:
                raise NotCaptured(f"{without} of {len(trained)} trained tensors get no gradient")
            gradients = StaticGradients(trained)
            gradients.attach()
            expected = gradients.clone()
            gradients.zero()
            set_random_state(drawn)
            step = CapturedSteps(
                lambda static: self._step(inner, static), gradients, self._recorder
            )
            return step, expected, step.run(batch)

        try:
            with averaging(model):
                loss = plain().float().reshape(1)
            steps, expected, found = together(begun)
            if inner is not model:
                steps.gradients.average(0.0)
            together(lambda: compare(loss, expected, found, steps.gradients.clone()))
        finally:
            set_random_state(drawn)
            model.zero_grad()
        steps.gradients.attach()
        return steps

    def _check_recomputation(
        self, drawn: Sequence[torch.Tensor], batch: dict[str, torch.Tensor]
    ) -> None:
        """Raise NotCaptured where checkpointed layers would be recomputed otherwise than they ran.

        `drawn` is the state of the random numbers before a step that has run.
        """
        if not self._layers.any:
            return
        if self._layers.reentrant:
            raise NotCaptured("reentrant checkpointing runs a backward within the backward")
        now = random_state(batch["input_ids"].device)
        if not all(map(torch.equal, drawn, now)):
            raise NotCaptured("checkpointed layers draw random numbers")

    def _step(self, model: nn.Module, static: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns loss and sums [1 + n] of a forward and backward over tensors alone."""
        inputs = {name: static[name] for name in INPUTS}
        loss, sums = self._loss(model, inputs, static[_IN_GLOBAL_BATCH])
        self._backward(loss)
        return torch.cat([loss.detach().float().reshape(1), sums.detach().float()])

    def _zero_grad(self, set_to_none: bool = True) -> None:
        """What `zero_grad` of the model is while steps are recorded."""
        self._steps.gradients.zero()

    def make_room(self) -> None:
        """Let go of recordings where other work may need their memory; steps record anew then."""
        if self._steps is not None and self._recorder.short_of_memory():
            self._steps.forget()

    def end(self, why: str) -> None:
        """Drop all recordings; steps are plain from now on, and gradients are the model's own."""
        self.off = why
        if self._model is not None:
            vars(self._model).pop("zero_grad", None)
        if self._steps is not None:
            self._steps.forget()
        if self._layers is not None:
            self._layers.undo()
        self._steps = self._model = self._layers = None

    def facts(self) -> dict[str, Any]:
        """Returns how many recordings were made and how many micro-batches had none, or `off`."""
        if self.off or self._steps is None:
            return {"off": self.off or "there was no step"}
        return {"recordings": self._steps.captures, "plain_micro_batches": self._steps.plain}
