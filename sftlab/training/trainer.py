"""trl's SFTTrainer on the fast path: packed rows, compiled layers, a loss without whole logits, no
waiting for the GPU.

It also counts tokens and notes what really ran. Batches, order and loss are SFTTrainer's.
"""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from torch.utils.data import IterableDataset, RandomSampler, Sampler, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from trl import SFTTrainer, get_peft_config, get_quantization_config

from sftlab.config.launch import Launch
from sftlab.config.recipe import Recipe
from sftlab.data.collator import Collator, for_the_model
from sftlab.data.samplers import BalancedSampler, WholeBatches, row_lengths, whole_batches
from sftlab.data.splits import Splits
from sftlab.data.tokenized_dataset import refuse_other_encoding, training_rows
from sftlab.fastpath import fused_loss, varlen_attention
from sftlab.fastpath.compile_layers import compile_layers
from sftlab.fastpath.float8 import freeze_in_float8, nothing_for_torchao
from sftlab.fastpath.fsdp import average_replicated_, clip_sharded_, gather_ahead, settle_plugin
from sftlab.fastpath.selection import FastPath
from sftlab.measurement.flops import flops_per_token
from sftlab.measurement.memory import MemorySplit
from sftlab.measurement.throughput import Meter
from sftlab.models.likelihood import nats_per_token
from sftlab.models.loading import model_init_kwargs
from sftlab.training.checkpointing import Resume, dtypes_kept
from sftlab.training.verification import (
    seen_linear,
    verify_precision,
    verify_strategy,
    verify_trained,
)


class LabTrainer(SFTTrainer):
    """SFTTrainer that takes the fast path, feeds a `Meter`, and stops where what runs is not what
    was asked for.

    Raises RuntimeError for another number of processes or strategy, for linears that compute in
    another dtype, and for a model whose loss would not be given the number of tokens of the global
    batch.
    """

    def __init__(
        self,
        *args: Any,
        meter: Meter,
        launch: Launch,
        fast: FastPath,
        memory: MemorySplit | None,
        **kwargs: Any,
    ) -> None:
        self.meter, self.launch, self.fast, self.memory = meter, launch, fast, memory
        self.observed: dict[str, str] = {}
        self._sums: torch.Tensor | None = None
        self._real_tokens, self._held_out = 0, []
        varlen_attention.register()
        super().__init__(*args, **kwargs)
        if not self.model_accepts_loss_kwargs:
            raise RuntimeError(
                "accumulation would become a mean of means: the model's forward must accept "
                "**kwargs"
            )
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        # whether LoRA matrices are whole under FSDP
        self.replicated = (
            plugin is not None and plugin.fsdp_version == 2 and settle_plugin(plugin, self.model)
        )
        self.resume = Resume(self)
        self.add_callback(self.resume)
        if isinstance(self.train_dataset, IterableDataset):
            self.train_dataset = WholeBatches(self.train_dataset, self.global_batch)
        self.data_collator = Collator(
            self.processing_class.pad_token_id, fast.packing, self.args.pad_to_multiple_of
        )
        self.flops = flops_per_token(self.model)
        self._take_fast_path()

    @property
    def _base(self) -> PreTrainedModel:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def _trained(self) -> list[nn.Parameter]:
        # Those that the optimizer has: to find them among a model's modules takes as long as 3 % of
        # a step
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _take_fast_path(self) -> None:
        base = self._base
        why = fused_loss.why_not(base) or (
            "label smoothing needs whole logits" if self.args.label_smoothing_factor else None
        )
        why = why or (
            f"loss_type is {self.args.loss_type}" if self.args.loss_type != "nll" else None
        )
        if why and self.fast.fused_loss:
            raise ValueError(f"fused_loss is not possible here: {why}; leave it out of the recipe")
        if why and self.fast.fused_loss is None:
            self.fast.reasons["fused_loss"] = why
        self.fast.fused_loss = not why and self.fast.fused_loss is not False
        if self.fast.fused_loss:
            fused_loss.add_frozen_head_loss(base)
        if self.args.mixed_precision == "fp8":
            freeze_in_float8(self.model, self.accelerator.device)
        if self.fast.compile_layers:
            compile_layers(base)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """One micro-batch; before the first one the strategy and the precision are checked."""
        self.meter.count(inputs["real_tokens"], inputs["real_rows"], len(inputs["targets"]))
        if not self.observed:
            verify_strategy(self)
            verify_trained(self.model, self._trained)
            gather_ahead(self._base)
            self.observed = seen_linear(self, model, inputs)
            verify_precision(self)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.replicated and self.accelerator.sync_gradients:
            average_replicated_(self._trained)
        return loss

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> AbstractContextManager:
        """Whole LoRA matrices are float32 to FSDP too, and multiplied in the compute dtype as DDP
        multiplies them.
        """
        return (
            self.accelerator.autocast()
            if self.replicated
            else super().autocast_smart_context_manager()
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Nats of the tokens in the loss over the number of such tokens in the global batch, as trl
        computes it.
        """
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
        sums = torch.stack([entropies.sum(), hits.sum(), torch.ones_like(hits).sum()])
        self._sums = sums if self._sums is None else self._sums + sums
        self._real_tokens += inputs["real_tokens"]
        if num_items_in_batch is None:
            return nats.sum() / max(1, len(nats))
        return nats.sum() / num_items_in_batch.clamp(min=1) * self._processes_averaged

    @property
    def _processes_averaged(self) -> int:
        # num_items_in_batch counts the tokens of every process, and DDP averages their gradients
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def token_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Nats, entropies and hits of every token in the loss, each [n]."""
        plain = for_the_model(inputs)
        positions = inputs["loss_positions"]
        if self.fast.fused_loss:
            del plain["labels"]
            return model(**plain, loss_positions=positions, targets=inputs["targets"])
        outputs = model(**plain, use_cache=False, fused_lm_head=True)
        fields = (-outputs.log_probs, outputs.entropy, outputs.is_top1.float())
        return tuple(pad(field, (0, 1)).flatten()[positions] for field in fields)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """trl's metrics, summed on the device and read here alone."""
        if self._sums is not None and self.model.training:
            sums = torch.cat(
                [
                    self._sums.double(),
                    self._sums.new_tensor([self._real_tokens], dtype=torch.float64),
                ]
            )
            entropy, hits, tokens, real = self.accelerator.reduce(sums, reduction="sum").tolist()
            self._total_train_tokens += int(real)
            self._sums, self._real_tokens = None, 0
            for name, value in (
                ("entropy", entropy / tokens),
                ("mean_token_accuracy", hits / tokens),
            ):
                self._metrics["train"][name].append(value)
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        super().log(logs, start_time)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        # under save_strategy best a checkpoint that somebody else asked for, to stop, is saved all
        # the same
        return super()._determine_best_metric(*args, **kwargs) or self.control.should_save

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.resume.save(lambda: super(LabTrainer, self)._save_checkpoint(model, trial))

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with dtypes_kept(self.model):
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint and self.accelerator.scaler is not None:
            # under FSDP torch takes an empty step first, which asks for the loss scale; the real
            # one is loaded later
            self.accelerator.scaler.scale(torch.zeros(1, device=self.args.device))
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        with dtypes_kept(self.model):
            super()._load_best_model()

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        begun = super()._init_training_state(max_steps, steps_per_epoch, epochs, checkpoint, trial)
        return self.resume.begin(checkpoint, max_steps, epochs) or begun

    def _finalize_training(self, trial: Any, samples: int, started: float) -> TrainOutput:
        self._initial_global_step = 0  # the sum of losses has those of earlier starts
        self._tr_loss = self.accelerator.reduce(
            self._tr_loss, reduction="mean"
        )  # each has its own since the last log
        self.observed = self.observed or self.resume.earlier["observed"]
        return super()._finalize_training(trial, samples, time.time() - self.resume.seconds)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Nats and tokens of every row are kept, so that the evaluation's loss is the corpus's."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            nats = self.token_losses(model, inputs)[0].double()
        rows = inputs["loss_rows"]
        parts = nats.new_zeros(inputs["real_rows"], 2).index_add_(
            0, rows, torch.stack([nats, torch.ones_like(nats)], 1)
        )
        self._held_out.append(self.accelerator.gather_for_metrics(parts))
        return nats.sum() / max(1, len(nats)), None, None

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """transformers' loop with the exact loss:

        all nats over all tokens, not a mean of the batches' means.
        """
        self._held_out = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics[f"{metric_key_prefix}_loss"] = nats_per_token(
            torch.cat(self._held_out).cpu().numpy()
        )
        return output

    def validation_loss(self) -> float:
        """Nats per response token of the validation rows."""
        loop = self.evaluation_loop(
            self.get_eval_dataloader(), "validation", prediction_loss_only=True
        )
        return loop.metrics["eval_loss"]

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """FLOPs of a micro-batch.

        Transformers would walk over all modules at every step to say 6 a parameter.
        """
        return self.flops.token * inputs["real_tokens"] + self.flops.loss_token * len(
            inputs["targets"]
        )

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        trained = self._trained
        if not self.is_fsdp_enabled:
            return self.accelerator.clip_grad_norm_(trained, self.args.max_grad_norm)
        if not self.replicated and not all(
            isinstance(p, DTensor) and p.device_mesh.ndim == 1 for p in trained
        ):
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        clip = torch.nn.utils.clip_grad_norm_ if self.replicated else clip_sharded_
        return clip(trained, self.args.max_grad_norm)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        # labels of rows that were tokenized beforehand are made of it
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, "prompt_length"])]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if type(sampler) not in (RandomSampler, SequentialSampler):
            return sampler
        if not self.fast.packing:
            return whole_batches(sampler, self.global_batch)
        # accelerate would put the seedable sampler in by itself, and does not see into the balanced one
        order = whole_batches(
            sampler,
            self.global_batch,
            partial(SeedableRandomSampler, data_seed=self.args.data_seed),
        )
        micro_batch = self.args.per_device_train_batch_size
        return BalancedSampler(
            order, row_lengths(self.train_dataset), micro_batch, self.global_batch // micro_batch
        )

    @property
    def global_batch(self) -> int:
        """Rows an optimizer step, over all processes."""
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        built = super()._build_accelerator_args(**kwargs)
        if self.args.mixed_precision == "fp8":
            built["kwargs_handlers"].append(nothing_for_torchao())
        return built


def build_trainer(
    recipe: Recipe,
    launch: Launch,
    fast: FastPath,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    callbacks: Sequence[TrainerCallback] = (),
) -> LabTrainer:
    """The trainer of a recipe, its model loaded and on the fast path. Seeds everything.

    Raises ValueError for tokens that were made with another template, tokenizer, length or mask
    than the recipe's.
    """
    args, meter = recipe.training, Meter()
    train, validation = splits.train, splits.validation
    if splits.tokens:
        refuse_other_encoding(splits.tokens, tokenizer, args)
        train, validation = (
            training_rows(rows, splits.tokens, name, args.seed if args.shuffle_dataset else None)
            for name, rows in (("train", train), ("validation", validation))
        )
        args.dataset_kwargs = (args.dataset_kwargs or {}) | {"skip_prepare_dataset": True}
    measured = torch.cuda.is_available() if args.measure_memory is None else args.measure_memory
    memory = MemorySplit() if measured else None
    args.model_init_kwargs = model_init_kwargs(
        recipe.model, args.trust_remote_code, args.model_init_kwargs
    )
    if fast.attn_implementation:
        args.model_init_kwargs["attn_implementation"] = fast.attn_implementation
    args.packing = False  # trl's own would change which rows a step has
    set_seed(args.seed)
    return LabTrainer(
        model=recipe.model.model_name_or_path,
        args=args,
        train_dataset=train,
        eval_dataset=validation if len(validation) else None,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(recipe.model),
        peft_config=get_peft_config(recipe.model),
        callbacks=[*callbacks, meter, *([memory] if memory else [])],
        meter=meter,
        memory=memory,
        launch=launch,
        fast=fast,
    )
