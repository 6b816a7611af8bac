"""What transformers' and trl's trainers do wrong for this project, mended in one place.

Versions: transformers 5.23.0 (trainer.py), accelerate 1.15.0, peft 0.21.2, torch 2.13.0. Every
mend names the function at fault and says when it can be deleted.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import TrainOutput

from sftlab.fastpath.float8 import convert_nothing
from sftlab.models.loaded_adapter import refuse_other_tensors
from sftlab.runs.checkpoint_manifest import in_order, remove
from sftlab.training.clock import TrainingClock
from sftlab.training.early_stopping import early_stopping_of


class UpstreamFixes(Trainer):
    """The mends, before a trainer of trl's; a subclass sets `clock` before the training begins."""

    clock: TrainingClock

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Keep accelerate from converting linears to torchao's under fp8.

        accelerate, utils/ao.py, `convert_model_to_fp8_ao` converts the LoRA matrices as well.
        Delete when TrainingArguments can say which linears accelerate converts.
        """
        built = super()._build_accelerator_args(**kwargs)
        if self.args.mixed_precision == "fp8":
            built["kwargs_handlers"].append(convert_nothing())
        return built

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """Returns the epochs that are done, and the micro-batches of the next epoch.

        transformers' function of this name errs in four ways, and `_inner_training_loop` in one:

        - It forgets the best checkpoint if the run directory was moved.
        - A run killed after its last step takes one more step.
        - A run killed after early stopping trains on.
        - A stream counts as one epoch, however often it has begun again.
        - `eval_on_start` evaluates again at every start.

        Delete each when a resumed run of transformers passes tests/test_*continuation*.py.
        """
        done = super()._init_training_state(max_steps, steps_per_epoch, epochs, checkpoint, trial)
        if checkpoint is None:
            return done
        state, args = self.state, self.args
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and best.is_dir():
            state.best_model_checkpoint = str(best)
        args.eval_on_start = False
        patience = early_stopping_of(self.callback_handler.callbacks)
        if state.global_step >= max_steps or (patience and patience.had_stopped(state)):
            return epochs, 0
        if isinstance(self.train_dataset, IterableDataset):
            passes, share = divmod(state.epoch, 1)
            return int(passes), round(share * max_steps * args.gradient_accumulation_steps)
        return done

    def _run_epoch(
        self,
        model: nn.Module,
        epoch: int,
        train_dataloader: DataLoader,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Shuffle for the epoch also where its first batches are skipped.

        accelerate, data_loader.py, `DataLoaderShard.set_epoch` looks for a sampler two levels down.
        Under several processes `skip_first_batches` adds a third, and a run that resumed within its
        second epoch took the rows of the first. Delete when it finds every sampler.
        """
        if hasattr(order := innermost_sampler(train_dataloader), "set_epoch"):
            order.set_epoch(epoch)
        return super()._run_epoch(model, epoch, train_dataloader, *args, **kwargs)

    def _load_from_checkpoint(self, checkpoint: str, *args: Any, **kwargs: Any) -> None:
        """Keep the dtypes: see `dtypes_kept`. Raises ValueError where another adapter is loaded."""
        with dtypes_kept(self.model):
            super()._load_from_checkpoint(checkpoint, *args, **kwargs)
        if isinstance(self.model, PeftModel) and not self.is_fsdp_enabled:
            refuse_other_tensors(self.model, Path(checkpoint))

    def _load_best_model(self) -> None:
        """Keep the dtypes: see `dtypes_kept`."""
        with dtypes_kept(self.model):
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Create the loss scale before FSDP's optimizer state is loaded.

        torch, distributed/checkpoint/state_dict.py, `_init_optim_state` takes an empty step first,
        which fails if the gradient scaler has no scale yet. `_load_scaler` sets the saved scale
        afterwards. Delete when transformers loads the scaler before the optimizer.
        """
        if checkpoint and self.accelerator.scaler is not None:
            self.accelerator.scaler.scale(torch.zeros(1, device=self.args.device))
        super()._load_optimizer_and_scheduler(checkpoint)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """Save the checkpoint that a callback asked for, also if it is not the best one.

        transformers, `_maybe_log_save_evaluate` overwrites `control.should_save` with this value
        under `save_strategy: best`, and a run that is told to stop would save nothing. Delete when
        it no longer does.
        """
        return super()._determine_best_metric(*args, **kwargs) or self.control.should_save

    def _finalize_training(self, trial: Any, samples: int, started: float) -> TrainOutput:
        """Report the mean loss and the speed over all starts and all ranks.

        transformers' function of this name divides by the steps of this start, and adds the loss
        since the last log of its own rank only. Delete when `TrainerState` holds the sums and the
        last one is reduced. It also deletes every checkpoint but the best under `save_total_limit:
        1`, those of other programs too. Delete when it deletes none that it did not save.
        """
        self._initial_global_step = 0
        self._tr_loss = self.accelerator.reduce(self._tr_loss, reduction="mean")
        args, limit = self.args, self.args.save_total_limit
        args.save_total_limit = None
        try:
            output = super()._finalize_training(trial, samples, time.time() - self.clock.seconds)
        finally:
            args.save_total_limit = limit
        best = self.state.best_model_checkpoint
        if args.should_save and limit == 1 and best is not None:
            for folder in in_order(Path(args.output_dir)):
                if folder.name != Path(best).name:
                    remove(folder)
        return output


class SaveAfterEvaluation(TrainerCallback):
    """Saves an epoch's last checkpoint after the epoch was evaluated and logged.

    transformers, `_run_epoch` saves it before, and a run that resumes from it begins the next epoch
    without them. Delete when `_run_epoch` saves once an epoch is complete.
    """

    def __init__(self) -> None:
        self._postponed = False

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Postpone the checkpoint of an epoch's last step."""
        by_epoch = "epoch" in (args.eval_strategy, args.logging_strategy)
        if control.should_save and by_epoch and state.epoch == int(state.epoch):
            control.should_save, self._postponed = False, True

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Ask for the checkpoint that was postponed."""
        control.should_save, self._postponed = control.should_save or self._postponed, False


def innermost_sampler(loader: DataLoader) -> Sampler | None:
    """Returns the sampler of single rows, below all that batch, deal and skip (stream: None)."""
    sampler = loader.batch_sampler
    while hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler
    return getattr(sampler, "sampler", None)


@contextmanager
def dtypes_kept(model: nn.Module) -> Iterator[None]:
    """Loading inside the context leaves every parameter its dtype.

    peft, peft_model.py, `load_adapter` casts bfloat16 LoRA matrices, as QLoRA's, to float32 because
    transformers does not pass `autocast_adapter_dtype=False`. Delete when it does.
    """
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype != before[name]:
            parameter.data = parameter.data.to(before[name])
