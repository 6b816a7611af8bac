"""trl's SFTTrainer with the fast path and a loss that is exact over the global batch.

The fast path: packed rows, compiled layers, a loss without whole logits, no waiting for the GPU.
Batches, order and loss are SFTTrainer's.
"""

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.nn.functional import pad
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from sftlab.config.launch import PRECISIONS
from sftlab.data.buckets import loss_parts
from sftlab.data.collator import Collator, for_the_model
from sftlab.data.tiles import TILE
from sftlab.fastpath import fused_loss
from sftlab.fastpath.captured_step import NotCaptured
from sftlab.models.likelihood import nats_per_token
from sftlab.models.own_logits import Changes
from sftlab.training.packing_check import verify_packing
from sftlab.training.recorded_trainer import RecordedTrainer
from sftlab.training.step_capture import StepCapture

_log = logging.getLogger(__name__)
# nats a token beyond which exp() has no value
MOST_NATS = 700


class LabTrainer(RecordedTrainer, SFTTrainer):
    """SFTTrainer that takes the fast path, counts tokens, and checks what runs.

    Raises RuntimeError for a model whose loss would not be given the number of tokens of the global
    batch and, before the first step, if what runs differs from the launch config.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._held_out: list[torch.Tensor] = []
        # what answers questions at each evaluation and returns the scores of the answers
        self.answer: Callable[[nn.Module], dict[str, float]] | None = None
        super().__init__(*args, **kwargs)
        if not self.model_accepts_loss_kwargs:
            raise RuntimeError(
                "the loss of a step cannot be averaged over all its tokens: this model's forward "
                "takes no **kwargs, so short micro-batches would weigh too much"
            )
        self.data_collator = self._collator()
        self.capture: StepCapture | None = None
        if self.fast.captured_step:
            self.capture_steps()

    def capture_steps(self) -> None:
        """Capture micro-batches, before a training. Raises ValueError for a loss not fused."""
        if not self.fast.fused_loss:
            why = self.fast.reasons["fused_loss"]
            raise ValueError(
                f"captured_step is not possible here: the loss is not fused ({why}); leave it "
                "out of the recipe"
            )
        self.fast.captured_step = True
        self.capture = StepCapture(self.loss_and_sums, self.accelerator.backward)

    def _collator(self, parts: int = 0) -> Collator:
        return Collator(
            self.processing_class.pad_token_id,
            self.fast.packing,
            self.args.pad_to_multiple_of,
            mixers=self.fast.layers.mixers > 0,
            parts=parts,
            tile=self.fast.attention_tile or TILE,
        )

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        several = self.capture is not None and self.accelerator.num_processes > 1
        with self.capture.wrapping() if several else nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Returns the training batches; of a few sizes, where steps are recorded."""
        usual = self.data_collator
        if self.capture is not None:
            parts = loss_parts(self.flops.loss_token / self.flops.token)
            self.data_collator = self._collator(parts)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = usual

    def logit_changes(self) -> Changes | str:
        """Returns what the model does to its logits, or why there is no fused loss."""
        return fused_loss.needs_whole_logits(self.args) or super().logit_changes()

    def add_fused_loss(self, changes: Changes) -> None:
        """Let the model return nats, entropies and hits of the tokens in the loss."""
        rounded = None
        if self.args.mixed_precision == "fp8" and self.fast.may_have_float8_head:
            weight = self._base.get_output_embeddings().weight.data
            rounded = fused_loss.in_float8(weight.to(self.accelerator.device))
            self.fast.float8_head = rounded is not None
        fused_loss.add_frozen_head_loss(self._base, changes, rounded)

    def sequences(self) -> list[tuple[str, Dataset]]:
        """Returns the encoded rows with the names of their splits; training first, no streams."""
        named = [("training", self.train_dataset), ("validation", self.eval_dataset)]
        return [(name, rows) for name, rows in named if isinstance(rows, Dataset)]

    # ---- the step ----

    def loss_tokens(self, inputs: dict[str, Any]) -> int:
        """Returns how many tokens of a micro-batch are in the loss."""
        return inputs["loss_tokens"]

    def check_first_step(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Check strategy, precision, and that packed rows do not see one another."""
        super().check_first_step(model, inputs)
        if self.fast.packing:
            self._verify_packing(model, inputs)

    def _verify_packing(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.compute_loss_context_manager():
            verify_packing(
                self._base,
                lambda batch: self.token_losses(model.eval(), self._prepare_inputs(batch)),
                inputs,
                self.processing_class.pad_token_id,
                PRECISIONS[self.args.mixed_precision],
            )
        model.train()

    def forward_once(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Run one forward in training mode, for the check of the first step."""
        self.token_losses(model.train(), self._prepare_inputs(inputs))

    def forward_and_backward(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Add the gradients of a micro-batch, by a replay where steps are recorded.

        Where they can no longer be, batches stay filled up: those of a run that goes on are, too.
        """

        def plain() -> torch.Tensor:
            return super(LabTrainer, self).forward_and_backward(model, inputs, num_items_in_batch)

        def undone() -> torch.Tensor:
            sums = self.token_sums.state()
            loss = plain() if self.memory is None else self.memory.rehearse(plain)
            self.token_sums.restore(sums)
            return loss

        if self.capture is None or self.capture.off:
            return plain()
        self.optimizer.train()  # some swap the weights for an evaluation
        try:
            loss, sums = self.capture.run(model, inputs, num_items_in_batch, self._trained, undone)
        except NotCaptured as error:
            self.capture.end(str(error))
            self.fast.captured_step, self.fast.reasons["captured_step"] = False, str(error)
            _log.warning("captured_step is off: %s", error)
            return plain()
        self.token_sums.add(sums, inputs["real_tokens"])
        if self.memory is not None:
            self.memory.replayed()
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Returns trl's loss: nats of the tokens in the loss over their number per global batch."""
        loss = self._loss(model, inputs, return_outputs, num_items_in_batch)
        if self.memory is not None:
            self.memory.forward_ended()
        return loss

    def _loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        num_items_in_batch: torch.Tensor | None,
    ) -> Any:
        if not self.fast.fused_loss or return_outputs:
            return super().compute_loss(
                model, for_the_model(inputs), return_outputs, num_items_in_batch
            )
        loss, sums = self.loss_and_sums(model, inputs, num_items_in_batch)
        self.token_sums.add(sums, inputs["real_tokens"])
        return loss

    def loss_and_sums(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the fused loss, and the sums of entropies, hits and tokens in the loss [3].

        It reads nothing back from the device, and of `inputs` nothing but tensors.
        """
        nats, entropies, hits = self.token_losses(model, inputs)
        counted = torch.ones_like(hits)
        if "in_loss" in inputs:
            outside = ~inputs["in_loss"]
            nats, entropies, hits, counted = (
                one.masked_fill(outside, 0.0) for one in (nats, entropies, hits, counted)
            )
        sums = torch.stack([entropies.sum(), hits.sum(), counted.sum()])
        if num_items_in_batch is None:
            return nats.sum() / counted.sum().clamp(min=1), sums
        loss = nats.sum() / num_items_in_batch.clamp(min=1) * self._processes_averaged
        return loss, sums

    @property
    def _processes_averaged(self) -> int:
        # num_items_in_batch counts the tokens of every process, and DDP averages their gradients
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def token_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Returns nats, entropies and hits of every token in the loss, [n] each."""
        plain = for_the_model(inputs)
        positions = inputs["loss_positions"]
        if self.fast.fused_loss:
            plain.pop("labels", None)
            return model(**plain, loss_positions=positions, targets=inputs["targets"])
        outputs = model(**plain, use_cache=False, fused_lm_head=True)
        fields = (-outputs.log_probs, outputs.entropy, outputs.is_top1.float())
        return tuple(pad(field, (0, 1)).flatten()[positions] for field in fields)

    # ---- evaluation ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Returns the batch's loss, and keeps nats and tokens of each row for `evaluation_loop`."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            nats = self.token_losses(model, inputs)[0].double()
        nats_and_tokens = torch.stack([nats, torch.ones_like(nats)], 1)
        by_row = nats.new_zeros(inputs["real_rows"], 2)
        by_row.index_add_(0, inputs["loss_rows"], nats_and_tokens)
        self._held_out.append(self.accelerator.gather_for_metrics(by_row))
        return nats.sum() / max(1, len(nats)), None, None

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Run transformers' loop; the loss is all nats over all tokens, not a mean of means."""
        self._held_out = []
        if self.capture is not None:
            self.capture.make_room()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics[f"{metric_key_prefix}_loss"] = nats_per_token(
            torch.cat(self._held_out).cpu().numpy()
        )
        if self.answer and metric_key_prefix == "eval" and self.is_world_process_zero():
            with self.compute_loss_context_manager():
                scores = self.answer(self.model)
            output.metrics.update({f"eval_{name}": score for name, score in scores.items()})
        return output

    def validation(self) -> dict[str, float]:
        """Returns nats per response token of the validation rows, and their perplexity."""
        loop = self.evaluation_loop(
            self.get_eval_dataloader(),
            "validation",
            prediction_loss_only=True,
            metric_key_prefix="validation",
        )
        loss = loop.metrics["validation_loss"]
        perplexity = math.exp(loss) if loss < MOST_NATS else math.inf
        return {"validation_loss": loss, "validation_perplexity": perplexity}

    # ---- records ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log trl's metrics; the sums on the device are read here alone."""
        found = self.token_sums.take(self.accelerator) if self.model.training else None
        if found is not None:
            self._total_train_tokens += found.real_tokens
            metrics = self._metrics["train"]
            metrics["entropy"].append(found.entropy)
            metrics["mean_token_accuracy"].append(found.token_accuracy)
            metrics["num_tokens"] = [self._total_train_tokens]
        super().log(logs, start_time)
