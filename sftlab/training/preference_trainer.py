"""trl's DPOTrainer with this project's counting, checkpoints and checks."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from trl import DPOTrainer
from trl.trainer.utils import use_adapter

from sftlab.config.launch import COMPUTE_DTYPE, PRECISIONS
from sftlab.data.collator import for_the_model
from sftlab.data.encoded_pairs import IDS, sequences_of
from sftlab.data.pair_collator import OF_TRL, REFERENCE_OF_TRL, PairCollator
from sftlab.data.samplers import row_lengths
from sftlab.data.tiles import TILE
from sftlab.fastpath.fused_loss import add_frozen_head_log_probs
from sftlab.fastpath.packed_decoder import pack_decoder
from sftlab.measurement.flops import Flops
from sftlab.models.own_logits import Changes
from sftlab.models.plain_attention import plain_attention
from sftlab.training.recorded_trainer import RecordedTrainer
from sftlab.training.reference_pass import with_reference
from sftlab.training.verification import global_batch

# peft's name of the frozen copy of an adapter that the training goes on from
REFERENCE = "ref"
# the largest difference of two forwards of equal weights, per nat of a side's log-probability,
# in units of the compute dtype's rounding
_ROUNDINGS = 32
# the largest mean difference of a token's log-probability between the fast path and trl's own, in
# nats: about five times what results/numerical_parity has of fine-tuning
SAME_LOG_PROBS = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.1, "fp8": 1.0}


class SideLogProbs(NamedTuple):
    """Log-probabilities of the answers of a batch in nats, [pairs] each."""

    chosen: torch.Tensor
    rejected: torch.Tensor


def pairs_of_batches(pairs: int, at_once: int) -> list[int]:
    """Returns how many of `pairs` each batch of all processes has."""
    return [min(at_once, pairs - start) for start in range(0, pairs, at_once)]


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    if len(values) != len(weights):  # one for all batches
        return sum(values) / len(values)
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


class PreferenceTrainer(RecordedTrainer, DPOTrainer):
    """DPOTrainer whose reference is the model as it was before the training.

    That is the adapter which the training goes on from, frozen beside the one that trains, or the
    base model under a new adapter. Raises RuntimeError before the first step if the model does not
    begin as its reference.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # trl would compute the reference before the fast path is taken
        asked, kwargs["args"].precompute_ref_log_probs = (
            kwargs["args"].precompute_ref_log_probs,
            False,
        )
        super().__init__(*args, **kwargs)
        self.args.precompute_ref_log_probs = asked
        self.reference_once = self.args.reference_once(
            len(self.train_dataset), global_batch(self.args)
        )
        self.data_collator = PairCollator(
            self.processing_class.pad_token_id,
            self.args.pad_to_multiple_of,
            packed=self.fast.packing,
            fused=bool(self.fast.fused_loss),
            mixers=self.fast.layers.mixers > 0,
            tile=self.fast.attention_tile or TILE,
        )
        if not self.reference_once:
            # the reference's forward takes 2 of the 4 FLOPs of a frozen weight once more
            self.flops = Flops(*(1.5 * one for one in self.flops))

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """Returns the pairs as they are: they are encoded already."""
        return dataset

    def sequences(self) -> list[tuple[str, Dataset]]:
        """Returns each side of the encoded pairs; that of training's chosen answers first."""
        named = [("training", self.train_dataset), ("validation", self.eval_dataset)]
        return [
            (f"{name} ({side})", sequences_of(rows, side))
            for name, rows in named
            if rows is not None
            for side in ("chosen", "rejected")
        ]

    def row_lengths(self) -> np.ndarray:
        """Returns the tokens of every training pair, of both sides."""
        return sum(self._side_lengths())

    def sequence_lengths(self) -> np.ndarray:
        """Returns the tokens of every side of the training pairs."""
        return np.concatenate(self._side_lengths())

    def _side_lengths(self) -> list[np.ndarray]:
        return [row_lengths(self.train_dataset, side) for side in IDS]

    def logit_changes(self) -> Changes | str:
        """Returns what the model does to its logits, or why there is no fused loss."""
        if self.use_weighting:
            return "use_weighting needs the whole distribution"
        if self.aux_loss_enabled:
            return "the router has a loss besides"
        return super().logit_changes()

    def choose_loss(self) -> None:
        """Take the fused log-probabilities and packed sides, before layers are compiled."""
        super().choose_loss()
        if self.fast.packing:
            pack_decoder(self._base)

    def add_fused_loss(self, changes: Changes) -> None:
        """Let the model return log-probabilities without whole logits, as trl's head does."""
        add_frozen_head_log_probs(self._base, changes)

    def loss_tokens(self, inputs: dict[str, Any]) -> int:
        """Returns how many tokens of a micro-batch are in answers, of both sides."""
        return inputs["loss_tokens"]

    def before_training(self) -> None:
        """Compute the reference of all pairs, where steps do not."""
        if self.reference_once and not self.precompute_ref_logps:
            at_once = self.args.per_device_train_batch_size
            self.train_dataset = with_reference(self, self.train_dataset, at_once)
            if self.eval_dataset is not None:
                self.eval_dataset = with_reference(self, self.eval_dataset, at_once, evaluates=True)
            self.precompute_ref_logps = True

    def forward_once(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Run one forward in training mode, for the check of the first step."""
        self.side_log_probs(model.train(), inputs)

    def side_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> SideLogProbs:
        """Returns the log-probabilities of the answers of a batch under the trained adapter."""
        return SideLogProbs(*self._log_probs(model, inputs).sum(dim=1).chunk(2))

    def _log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Returns the log-probability of each next token of an answer, [2 pairs, tokens - 1].

        It is for checks: layers are not compiled for it.
        """
        given = self._prepare_inputs(for_the_model(inputs))
        given = {name: one for name, one in given.items() if name not in REFERENCE_OF_TRL}
        mask = given.pop("completion_mask")
        labels = given["input_ids"].masked_fill(mask == 0, -100)
        eager = torch.compiler.set_stance("force_eager")
        with torch.no_grad(), self.accelerator.autocast(), eager:
            return model(**given, labels=labels, use_cache=False, fused_lm_head=True).log_probs

    def reference_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> SideLogProbs:
        """Returns the log-probabilities of the answers of a batch under the reference.

        They are sums over tokens also where `ld_alpha` weights those of trl's loss.
        """
        inner = self.accelerator.unwrap_model(self.model)
        with use_adapter(inner, REFERENCE if REFERENCE in inner.peft_config else None):
            return self.side_log_probs(model, inputs)

    def check_first_step(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Check strategy and precision and, at step 0, that the model begins as its reference."""
        super().check_first_step(model, inputs)
        if self.fast.packing or self.fast.fused_loss:
            self._refuse_other_log_probs(model, inputs)
        if self.state.global_step == 0:
            self._refuse_other_reference(model, inputs)

    def _refuse_other_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Raise RuntimeError where the fast path's log-probabilities are not trl's own."""
        precision = PRECISIONS[self.args.mixed_precision]
        found = self._log_probs(model, inputs)
        with plain_attention(self._base):
            own = self._log_probs(model, {name: inputs[name] for name in OF_TRL})
        apart = float((found.float() - own.float()).abs().sum()) / self.loss_tokens(inputs)
        if not apart <= SAME_LOG_PROBS[precision]:
            raise RuntimeError(
                f"the fast path gives other log-probabilities than trl: they differ by {apart:.3g} "
                f"nats a token (expected at most {SAME_LOG_PROBS[precision]} in {precision}): pass "
                "--packing false --fused_loss false"
            )

    def _refuse_other_reference(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        now = torch.stack(self.side_log_probs(model, inputs)).float()
        reference = torch.stack(self.reference_log_probs(model, inputs)).float()
        compute = getattr(torch, COMPUTE_DTYPE[PRECISIONS[self.args.mixed_precision]])
        allowed = _ROUNDINGS * torch.finfo(compute).eps * reference.abs().clamp(min=1)
        apart = (now - reference).abs()
        if self.precompute_ref_logps:
            given = torch.stack([inputs[name] for name in REFERENCE_OF_TRL]).to(reference)
            apart = torch.maximum(apart, (given - reference).abs())
        if not bool((apart <= allowed).all()):
            raise RuntimeError(
                "the model does not begin as its reference: before the first step their "
                f"log-probabilities of an answer differ by up to {float(apart.max()):.3g} nats"
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Returns trl's loss of the pairs: the mean of a micro-batch."""
        loss = super().compute_loss(model, for_the_model(inputs), return_outputs)
        if self.memory is not None:
            self.memory.forward_ended()
        return loss

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the batch's loss, and keeps the reward margin of each pair for `validation`.

        trl has means of batches alone. Its loss runs the model, then the reference where that is
        not known.
        """
        found: list[torch.Tensor] = []
        hook = self.model.register_forward_hook(
            lambda *call: found.append(call[-1].log_probs.sum(dim=1))
        )
        try:
            predicted = super().prediction_step(*args, **kwargs)
        finally:
            hook.remove()
        now, *reference = found
        if self.precompute_ref_logps:
            inputs = args[1]
            reference = [torch.cat([inputs[name] for name in REFERENCE_OF_TRL]).to(now)]
        chosen, rejected = (now - reference[0]).chunk(2)
        self._margins.append(
            self.accelerator.gather_for_metrics(self.beta * (chosen - rejected).float())
        )
        return predicted

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run transformers' loop; its output has trl's metrics too, as means over pairs."""
        self._margins: list[torch.Tensor] = []
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        of_batches = pairs_of_batches(len(self.eval_dataset), self._pairs_at_once)
        found = {
            n: _mean(values, of_batches) for n, values in self._metrics["eval"].items() if values
        }
        self._metrics["eval"].clear()  # trl would log means of batches in place of these
        output.metrics.update({f"{prefix}_{name}": value for name, value in found.items()})
        return output

    @property
    def _pairs_at_once(self) -> int:
        return self.args.per_device_eval_batch_size * self.args.world_size

    def validation(self) -> dict[str, float]:
        """Returns loss, reward accuracy and margin of the validation pairs, each pair counted once.

        The batch size and the number of processes do not matter.
        """
        loop = self.evaluation_loop(
            self.get_eval_dataloader(), "validation", prediction_loss_only=True
        )
        margins = torch.cat(self._margins)
        return {
            "validation_loss": loop.metrics["eval_loss"],
            "validation_reward_accuracy": float((margins > 0).float().mean()),
            "validation_reward_margin": float(margins.mean()),
        }

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the trained adapter alone: the reference is made again from what it was."""
        super()._save(output_dir, state_dict)
        shutil.rmtree(Path(output_dir or self.args.output_dir) / REFERENCE, ignore_errors=True)

    def what_ran(self) -> dict[str, Any]:
        """Returns what ran, for run.json, with what the reference is and the loss's settings."""
        has_copy = REFERENCE in self.model.peft_config
        return super().what_ran() | {
            "method": "dpo",
            "reference": "the adapter that it started from" if has_copy else "the base model",
            "reference_computed": "once" if self.reference_once else "in every step",
            "beta": self.beta,
            "loss_type": list(self.loss_types),
        }
