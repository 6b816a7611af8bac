"""What every trainer here shares: counting, checkpoints, order of rows, checks of what runs."""

import logging
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from torch.utils.data import IterableDataset, RandomSampler, Sampler, SequentialSampler
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput

from sftlab.config.launch import COMPUTE_DTYPE, PRECISIONS, Launch
from sftlab.data.samplers import BalancedSampler, WholeBatches, row_lengths, whole_batches
from sftlab.data.tiles import tile_for
from sftlab.fastpath import fused_loss
from sftlab.fastpath.compile_layers import compile_layers
from sftlab.fastpath.experts import take_experts_product
from sftlab.fastpath.experts_lora import take_experts_lora
from sftlab.fastpath.float8 import freeze_in_float8
from sftlab.fastpath.float8_mlp import fuse_float8_mlps
from sftlab.fastpath.four_bit_layers import four_bit_linears, take_four_bits
from sftlab.fastpath.fsdp import (
    average_replicated_,
    clip_sharded_,
    gather_ahead,
    is_sharded_over_one_mesh,
    resolve_plugin,
)
from sftlab.fastpath.fsdp_units import layers_in_units, take_units
from sftlab.fastpath.fused_lora import SIBLINGS, take_fused_lora
from sftlab.fastpath.packed_mixers import pack_mixers
from sftlab.fastpath.selection import FastPath
from sftlab.measurement.flops import flops_per_token
from sftlab.measurement.memory import MemorySplit, PeakMemory
from sftlab.measurement.throughput import Meter
from sftlab.models.inner_model import inner_model
from sftlab.models.mixers import (
    NO_KERNELS,
    has_kernels,
    leave_out_kernels,
    packed_mixers,
    why_kernels_fail,
)
from sftlab.models.own_logits import Changes, logit_changes, own_log_probs_if_needed
from sftlab.models.plain_adapter import Matrices
from sftlab.startup.phases import FIRST_CHECKS, phase_ended
from sftlab.training.adapter_start import AdapterStart
from sftlab.training.checkpointing import Checkpointer
from sftlab.training.clock import TrainingClock
from sftlab.training.finiteness import Finiteness
from sftlab.training.log_sums import TokenSums, TrainerSums
from sftlab.training.loraplus import speed_up_b
from sftlab.training.optimizer_waits import wait_to_read
from sftlab.training.router_loss import leave_out_frozen_router
from sftlab.training.short_walks import short_walks
from sftlab.training.source_counts import SourceCounts
from sftlab.training.upstream_fixes import SaveAfterEvaluation, UpstreamFixes
from sftlab.training.verification import (
    FirstStepCheck,
    global_batch,
    verify_gradients,
    what_ran,
)

_log = logging.getLogger(__name__)


class RecordedTrainer(UpstreamFixes):
    """Counts tokens, continues exactly and checks what runs; stands before a trainer of trl's.

    A subclass names trl's trainer behind this class, gives the methods that raise
    NotImplementedError here, and sets its own `data_collator`. Raises RuntimeError before the first
    step if what runs differs from the launch config.
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
        self.adapter_start: AdapterStart | None = None
        self.meter, self.launch, self.fast, self.memory = meter, launch, fast, memory
        super().__init__(*args, **kwargs)
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        shards = plugin is not None and plugin.fsdp_version == 2
        # whether FSDP2 leaves the LoRA matrices whole on every process
        self.replicated = shards and resolve_plugin(plugin, self.model)
        if isinstance(self.train_dataset, IterableDataset):
            self.train_dataset = WholeBatches(self.train_dataset, global_batch(self.args))
        self.flops = flops_per_token(self.model)
        self._count_over_all_starts()
        self._take_fast_path()
        if shards:
            take_units(self.model, self.fast, plugin, self.args)

    def _count_over_all_starts(self) -> None:
        self.clock = TrainingClock(lambda: self.meter.waited_s)
        self.peak_memory = PeakMemory(self.memory)
        self.first_step = FirstStepCheck(self.launch)
        self._has_seen_gradients = False
        self._walks, self._has_short_walks = ExitStack(), True  # until train() is called
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
        if self.fast.packing:
            tile = tile_for(self.sequence_lengths())
            self.fast.attention_tile = min(tile, self.fast.largest_tile)
        if off := leave_out_frozen_router(self):
            self.fast.reasons["router_loss"] = off
        if differs := own_log_probs_if_needed(base):
            self.fast.reasons["trl_fused_head"] = differs
        precision = PRECISIONS[self.args.mixed_precision]
        dtype = getattr(torch, COMPUTE_DTYPE[precision])
        self._take_mixers(base, dtype)
        self._take_experts_product(base, precision)
        self.choose_loss()
        float8 = self.args.mixed_precision == "fp8"
        if float8 and not four_bit_linears(self.model):
            self.fast.shared_scales |= self.fast.fused_lora
            together = SIBLINGS if self.fast.shared_scales else ()
            freeze_in_float8(self.model, self.accelerator.device, together)
        take_four_bits(self.model, self.fast, self.launch.strategy, dtype, float8)
        take_fused_lora(self.model, self.fast, self.launch.strategy, dtype)
        if float8 and self.fast.compile_layers and self.accelerator.device.type == "cuda":
            fuse_float8_mlps(self.model)
        if self.fast.compile_layers:
            compile_layers(base, checkpointed=self.args.gradient_checkpointing)

    def _take_mixers(self, base: PreTrainedModel, dtype: torch.dtype) -> None:
        if not packed_mixers(base):
            return
        mine = NO_KERNELS
        if has_kernels(base):
            mine = why_kernels_fail(base, dtype, self.accelerator.device)
        whys = gather_object([mine])
        why = next(filter(None, whys), None)  # in any process: all compute alike
        self.fast.mixers = "torch" if why else "kernels"
        if why:
            leave_out_kernels(base)
        if why and set(whys) != {NO_KERNELS}:
            self.fast.reasons["mixer_kernels"] = why
        pack_mixers(base)

    def _take_experts_product(self, base: PreTrainedModel, precision: str) -> None:
        self.fast.experts, why = take_experts_product(base, precision)
        if why and torch.cuda.is_available():
            self.fast.reasons["grouped_experts"] = why
        self.fast.experts_lora, why = take_experts_lora(self.model)
        if why:
            self.fast.reasons["factored_experts_lora"] = why

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer once, with the B matrices in groups of their own under LoRA+."""
        made, ratio = self.optimizer is None, self.args.loraplus_lr_ratio
        optimizer = super().create_optimizer(model)
        if made and ratio is not None:
            speed_up_b(optimizer, self.model if model is None else model, ratio)
        if made:
            wait_to_read(optimizer)
        return optimizer

    def choose_loss(self) -> None:
        """Take the fused loss where the recipe and the model allow it, before layers are compiled.

        Raises ValueError where the recipe asks for it in vain.
        """
        changes = self.logit_changes()
        reason = changes if isinstance(changes, str) else None
        if reason and self.fast.fused_loss:
            raise ValueError(
                f"fused_loss is not possible here: {reason}; leave it out of the recipe"
            )
        if reason and self.fast.fused_loss is None:
            self.fast.reasons["fused_loss"] = reason
        self.fast.fused_loss = not reason and self.fast.fused_loss is not False
        if self.fast.fused_loss:
            self.add_fused_loss(changes)

    def logit_changes(self) -> Changes | str:
        """Returns what the model does to its logits, or why there is no fused loss."""
        return fused_loss.why_not(self._base) or logit_changes(self._base)

    def add_fused_loss(self, changes: Changes) -> None:
        """Let the model compute the fused loss; `changes` is what it does to its logits."""
        raise NotImplementedError

    def row_lengths(self) -> np.ndarray:
        """Returns the tokens of every training row."""
        return row_lengths(self.train_dataset)

    def sequence_lengths(self) -> np.ndarray:
        """Returns the tokens of every sequence that training packs."""
        return self.row_lengths()

    def sequences(self) -> list[tuple[str, Dataset]]:
        """Returns rows of `input_ids` and `labels` with the names of their splits."""
        raise NotImplementedError

    def validation(self) -> dict[str, float]:
        """Returns what is measured on the validation rows, for run.json."""
        raise NotImplementedError

    def loss_tokens(self, inputs: dict[str, Any]) -> int:
        """Returns how many tokens of a micro-batch are in the loss."""
        raise NotImplementedError

    def forward_once(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Run one forward in training mode, for the check of the first step."""
        raise NotImplementedError

    @property
    def _base(self) -> PreTrainedModel:
        return inner_model(self.model)

    @property
    def _trained(self) -> list[nn.Parameter]:
        # The optimizer's: finding them among the model's modules takes 3 % of a step.
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """Train, or resume from a checkpoint's folder; the clock starts."""
        self.clock.start()
        self.before_training()
        self.checkpointer.resume_from = resume_from_checkpoint
        if self.adapter_start and not resume_from_checkpoint:
            # compiled layers would not run peft's hooks
            with torch.compiler.set_stance("force_eager"):
                self.adapter_start.begin(
                    self.model, self.train_dataset, self.data_collator, self.args.seed
                )
        self._has_short_walks = False
        with self._walks:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def before_training(self) -> None:
        """Do what a method needs before its first step; the clock runs."""

    def begin_adapter_with(self, start: AdapterStart) -> None:
        """Begin the adapter so before the first step; checkpoints keep what was measured."""
        self.adapter_start = start
        self.checkpointer.keep("adapter_start", start)

    # ---- the step ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Run one micro-batch; check strategy and precision before the first, and gradients later.

        Gradients are checked where a step is complete: under FSDP2 they are elsewhere until then.
        """
        self.meter.count(inputs["real_tokens"], inputs["real_rows"], self.loss_tokens(inputs))
        self.source_counts.add(inputs.get("by_source", ()))
        if not self.first_step.done:
            self.check_first_step(model, inputs)
            phase_ended(FIRST_CHECKS)
        if not self._has_short_walks:
            self._has_short_walks = True
            self._walks.enter_context(short_walks(model, self.optimizer.param_groups))
        loss = self.forward_and_backward(model, inputs, *args, **kwargs)
        if not self._has_seen_gradients and self.accelerator.sync_gradients:
            self._has_seen_gradients = True
            if (unused := verify_gradients(self.model)) and self.is_world_process_zero():
                _log.warning(unused)
        self.finiteness.add_loss(loss)
        if self.accelerator.scaler is not None:  # a step that fp16 skips adds nothing to the mean
            loss = torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)
        if self.replicated and self.accelerator.sync_gradients:
            average_replicated_(self._trained)
        return loss

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with layers_in_units(self._base, self.fast.layers_per_unit or 1):
            return super()._prepare_for_training(*args, **kwargs)

    def forward_and_backward(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Add the gradients of a micro-batch to those that are there; returns its loss."""
        return super().training_step(model, inputs, *args, **kwargs)

    def check_first_step(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Check strategy and precision before the first step of a start."""
        gather_ahead(self._base, self.fast.layers_per_unit or 1)
        forward = partial(self.forward_once, model, inputs)
        self.first_step.run(self, model, self._trained, forward)

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> AbstractContextManager:
        """Autocast the step where FSDP2 leaves LoRA matrices whole.

        They are float32 there, and DDP multiplies them in the compute dtype too.
        """
        if self.replicated:
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager()

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
        return BalancedSampler(order, self.row_lengths(), micro_batch, rows // micro_batch)

    # ---- counting, checkpoints, records ----

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """Returns the FLOPs of a micro-batch, without a walk over all modules at every step."""
        in_loss = self.flops.loss_token * self.loss_tokens(inputs)
        return self.flops.token * inputs["real_tokens"] + in_loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.checkpointer.save(lambda: super(RecordedTrainer, self)._save_checkpoint(model, trial))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: trl's would replace a README.md in the run directory."""

    def what_ran(self) -> dict[str, Any]:
        """Returns precision, dtypes, strategy and sizes as they are, for run.json."""
        started = {"adapter_start": self.adapter_start.facts} if self.adapter_start else {}
        return what_ran(self, self.fast, self.first_step.observed) | started
