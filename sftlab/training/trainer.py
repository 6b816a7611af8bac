"""trl's SFTTrainer with the fast path, token counting, and checks of what really runs.

The fast path: packed rows, compiled layers, a loss without whole logits, no waiting for the GPU.
Batches, order and loss are SFTTrainer's.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch import nn
from torch.nn.functional import pad
from torch.utils.data import IterableDataset, RandomSampler, Sampler, SequentialSampler
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from sftlab.config.launch import PRECISIONS, Launch
from sftlab.data.collator import Collator, for_the_model
from sftlab.data.samplers import BalancedSampler, WholeBatches, row_lengths, whole_batches
from sftlab.fastpath import fused_loss
from sftlab.fastpath.compile_layers import compile_layers
from sftlab.fastpath.float8 import freeze_in_float8
from sftlab.fastpath.fsdp import (
    average_replicated_,
    clip_sharded_,
    gather_ahead,
    is_sharded_over_one_mesh,
    resolve_plugin,
)
from sftlab.fastpath.selection import FastPath
from sftlab.measurement.flops import flops_per_token
from sftlab.measurement.memory import MemorySplit, PeakMemory
from sftlab.measurement.throughput import Meter
from sftlab.models.likelihood import nats_per_token
from sftlab.models.own_logits import Changes, logit_changes, own_log_probs_if_needed
from sftlab.models.plain_adapter import Matrices
from sftlab.training.checkpointing import Checkpointer
from sftlab.training.clock import TrainingClock
from sftlab.training.finiteness import Finiteness
from sftlab.training.log_sums import TokenSums, TrainerSums
from sftlab.training.packing_check import verify_packing
from sftlab.training.router_loss import leave_out_frozen_router
from sftlab.training.source_counts import SourceCounts
from sftlab.training.upstream_fixes import SaveAfterEvaluation, UpstreamFixes
from sftlab.training.verification import FirstStepCheck, global_batch, what_ran


class LabTrainer(UpstreamFixes):
    """SFTTrainer that takes the fast path, counts tokens, and checks what runs.

    Raises RuntimeError for a model whose loss would not be given the number of tokens of the global
    batch and, before the first step, if what runs differs from the launch config.
    """

    def __init__(
        self,
        *args: Any,
        meter: Meter,
        launch: Launch,
        fast: FastPath,
        memory: MemorySplit | None,
        row_facts: dict[str, dict[str, int] | None],
        **kwargs: Any,
    ) -> None:
        # what max_length left of each split's rows; None of a stream
        self.row_facts = row_facts
        # the LoRA matrices as they began, where they took parts of the base model's weights
        self.initial_matrices: Matrices | None = None
        self.meter, self.launch, self.fast, self.memory = meter, launch, fast, memory
        self._held_out: list[torch.Tensor] = []
        # what answers questions at each evaluation and returns the scores of the answers
        self.answer: Callable[[nn.Module], dict[str, float]] | None = None
        super().__init__(*args, **kwargs)
        if not self.model_accepts_loss_kwargs:
            raise RuntimeError(
                "the loss of a step cannot be averaged over all its tokens: this model's forward "
                "takes no **kwargs, so short micro-batches would weigh too much"
            )
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        # whether FSDP2 leaves the LoRA matrices whole on every process
        self.replicated = (
            plugin is not None and plugin.fsdp_version == 2 and resolve_plugin(plugin, self.model)
        )
        if isinstance(self.train_dataset, IterableDataset):
            self.train_dataset = WholeBatches(self.train_dataset, global_batch(self.args))
        self.data_collator = Collator(
            self.processing_class.pad_token_id, fast.packing, self.args.pad_to_multiple_of
        )
        self.flops = flops_per_token(self.model)
        self._count_over_all_starts()
        self._take_fast_path()

    def _count_over_all_starts(self) -> None:
        self.clock = TrainingClock(lambda: self.meter.waited_s)
        self.peak_memory = PeakMemory(self.memory)
        self.first_step = FirstStepCheck(self.launch)
        self.token_sums = TokenSums(self.args.device)
        self.source_counts = SourceCounts()
        parts = {
            "clock": self.clock,
            "meter": self.meter,
            "memory": self.peak_memory,
            "first_step": self.first_step,
            "token_sums": self.token_sums,
            "source_counts": self.source_counts,
            "trainer_sums": TrainerSums(self),
        }
        self.checkpointer = Checkpointer(self, parts, lambda: self.clock.seconds)
        self.finiteness = Finiteness(self)
        # in this order: the clock notes the seconds that the checkpointer restores
        for callback in (self.checkpointer, self.clock, self.finiteness, SaveAfterEvaluation()):
            self.add_callback(callback)

    def _take_fast_path(self) -> None:
        base = self._base
        if off := leave_out_frozen_router(self):
            self.fast.reasons["router_loss"] = off
        if differs := own_log_probs_if_needed(base):
            self.fast.reasons["trl_fused_head"] = differs
        changes = self._fused_loss()
        reason = changes if isinstance(changes, str) else None
        if reason and self.fast.fused_loss:
            raise ValueError(
                f"fused_loss is not possible here: {reason}; leave it out of the recipe"
            )
        if reason and self.fast.fused_loss is None:
            self.fast.reasons["fused_loss"] = reason
        self.fast.fused_loss = not reason and self.fast.fused_loss is not False
        if self.fast.fused_loss:
            fused_loss.add_frozen_head_loss(base, changes)
        if self.args.mixed_precision == "fp8":
            freeze_in_float8(self.model, self.accelerator.device)
        if self.fast.compile_layers:
            compile_layers(base)

    def _fused_loss(self) -> Changes | str:
        """Returns what the model does to its logits, or why there is no fused loss."""
        if reason := fused_loss.why_not(self._base):
            return reason
        if self.args.label_smoothing_factor:
            return "label smoothing needs whole logits"
        if self.args.loss_type != "nll":
            return f"loss_type is {self.args.loss_type}"
        return logit_changes(self._base)

    @property
    def _base(self) -> PreTrainedModel:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def _trained(self) -> list[nn.Parameter]:
        # The optimizer's: finding them among the model's modules takes 3 % of a step.
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """Train, or resume from a checkpoint's folder; the clock starts."""
        self.clock.start()
        self.checkpointer.resume_from = resume_from_checkpoint
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    # ---- the step ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Run one micro-batch; before the first one, check strategy and precision."""
        self.meter.count(inputs["real_tokens"], inputs["real_rows"], len(inputs["targets"]))
        self.source_counts.add(inputs.get("by_source", ()))
        if not self.first_step.done:
            gather_ahead(self._base)
            forward = partial(self._forward_once, model, inputs)
            self.first_step.run(self, model, self._trained, forward)
            if self.fast.packing:
                self._verify_packing(model, inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.finiteness.add_loss(loss)
        if self.accelerator.scaler is not None:  # a step that fp16 skips adds nothing to the mean
            loss = torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)
        if self.replicated and self.accelerator.sync_gradients:
            average_replicated_(self._trained)
        return loss

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

    def _forward_once(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        self.token_losses(model.train(), self._prepare_inputs(inputs))

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> AbstractContextManager:
        """Autocast the step where FSDP2 leaves LoRA matrices whole.

        They are float32 there, and DDP multiplies them in the compute dtype too.
        """
        if self.replicated:
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager()

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
        nats, entropies, hits = self.token_losses(model, inputs)
        self.token_sums.add(entropies, hits, inputs["real_tokens"])
        if num_items_in_batch is None:
            return nats.sum() / max(1, len(nats))
        return nats.sum() / num_items_in_batch.clamp(min=1) * self._processes_averaged

    @property
    def _processes_averaged(self) -> int:
        # num_items_in_batch counts the tokens of every process, and DDP averages their gradients
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def token_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Returns nats, entropies and hits of every token in the loss, [n] each."""
        plain = for_the_model(inputs)
        positions = inputs["loss_positions"]
        if self.fast.fused_loss:
            del plain["labels"]
            return model(**plain, loss_positions=positions, targets=inputs["targets"])
        outputs = model(**plain, use_cache=False, fused_lm_head=True)
        fields = (-outputs.log_probs, outputs.entropy, outputs.is_top1.float())
        return tuple(pad(field, (0, 1)).flatten()[positions] for field in fields)

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        trained = self._trained
        if not self.is_fsdp_enabled:
            return self.accelerator.clip_grad_norm_(trained, self.args.max_grad_norm)
        if not self.replicated and not is_sharded_over_one_mesh(trained):
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        clip = torch.nn.utils.clip_grad_norm_ if self.replicated else clip_sharded_
        return clip(trained, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | None = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.finiteness.set_norm(norm)
        return norm

    # ---- the order of the rows ----

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        sampler, rows = super()._get_train_sampler(train_dataset), global_batch(self.args)
        if type(sampler) not in (RandomSampler, SequentialSampler):
            return sampler
        if not self.fast.packing:
            return whole_batches(sampler, rows)
        # accelerate would put in its seedable sampler itself, but only if it stands alone
        seedable = partial(SeedableRandomSampler, data_seed=self.args.data_seed)
        order = whole_batches(sampler, rows, seedable)
        micro_batch = self.args.per_device_train_batch_size
        return BalancedSampler(
            order, row_lengths(self.train_dataset), micro_batch, rows // micro_batch
        )

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
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics[f"{metric_key_prefix}_loss"] = nats_per_token(
            torch.cat(self._held_out).cpu().numpy()
        )
        if self.answer and metric_key_prefix == "eval" and self.is_world_process_zero():
            with self.compute_loss_context_manager():
                scores = self.answer(self.model)
            output.metrics.update({f"eval_{name}": score for name, score in scores.items()})
        return output

    def validation_loss(self) -> float:
        """Returns the nats per response token of the validation rows."""
        loop = self.evaluation_loop(
            self.get_eval_dataloader(),
            "validation",
            prediction_loss_only=True,
            metric_key_prefix="validation",
        )
        return loop.metrics["validation_loss"]

    # ---- counting, checkpoints, records ----

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

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """Returns the FLOPs of a micro-batch, without a walk over all modules at every step."""
        in_loss = self.flops.loss_token * len(inputs["targets"])
        return self.flops.token * inputs["real_tokens"] + in_loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.checkpointer.save(lambda: super(LabTrainer, self)._save_checkpoint(model, trial))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: trl's would replace a README.md in the run directory."""

    def what_ran(self) -> dict[str, Any]:
        """Returns precision, dtypes, strategy and sizes as they are, for run.json."""
        return what_ran(self, self.fast, self.first_step.observed)
