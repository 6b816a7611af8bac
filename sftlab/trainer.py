"""trl's SFTTrainer with an eye on it: it counts tokens and notes what really ran. Nothing of it is rewritten."""

from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.utils import AORecipeKwargs, DistributedType
from datasets import Dataset
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import RandomSampler, Sampler, SequentialSampler
from trl import SFTTrainer

from sftlab.launch import COMPUTE_DTYPE, PRECISIONS, Launch
from sftlab.measure import Meter


class LabTrainer(SFTTrainer):
    """SFTTrainer that feeds a `Meter` and stops at once where what runs is not what the launch config asked for.

    Raises RuntimeError for another number of processes or strategy, for linears that compute in another dtype, and for
    a model whose loss would not be given the number of tokens of the global batch.
    """

    def __init__(self, *args: Any, meter: Meter, launch: Launch, **kwargs: Any) -> None:
        self.meter = meter
        self.launch = launch
        self.observed: dict[str, str] = {}
        super().__init__(*args, **kwargs)
        if not self.model_accepts_loss_kwargs:
            raise RuntimeError("accumulation would become a mean of means: the model's forward must accept **kwargs")
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            # accelerate would reduce gradients and return losses in the compute dtype; DDP does neither
            compute = plugin.mixed_precision_policy.param_dtype
            plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch; the first one checks the strategy and the precision."""
        self.meter.count(inputs)
        if self.observed:
            return super().training_step(model, inputs, *args, **kwargs)
        _verify_strategy(self)
        linear = frozen_linear(model)
        hook = linear.register_forward_hook(self._observe)
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        finally:
            hook.remove()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        # A last, partial batch would be filled up with repeated rows under DDP and not on one process. Whole global
        # batches alone are the same under every world size; the rows left over are others in every epoch.
        sampler = super()._get_train_sampler(train_dataset)
        if type(sampler) not in (RandomSampler, SequentialSampler):
            return sampler
        whole = len(sampler) - len(sampler) % self.global_batch
        if whole == 0:
            raise ValueError(f"{len(sampler)} training sequences do not fill one global batch of {self.global_batch}")
        if isinstance(sampler, RandomSampler):
            return RandomSampler(sampler.data_source, num_samples=whole)
        return SequentialSampler(range(whole))

    @property
    def global_batch(self) -> int:
        """Rows (packed sequences, when packing) an optimizer step, over all processes."""
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size

    def _observe(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self.observed = {"linear": type(module).__name__, "output_dtype": str(output.dtype).removeprefix("torch.")}
        _verify_precision(self)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        built = super()._build_accelerator_args(**kwargs)
        if self.args.mixed_precision == "fp8":
            # accelerate would convert the LoRA matrices too, whose rank is too small for float8 to pay
            built["kwargs_handlers"].append(AORecipeKwargs(module_filter_func=is_base_linear))
        return built


def is_base_linear(module: nn.Module, name: str) -> bool:
    """Whether fp8 converts this module: a frozen linear inside the decoder, its sizes multiples of 16."""
    if not isinstance(module, nn.Linear) or "lora_" in name or "lm_head" in name:
        return False
    return module.in_features % 16 == 0 and module.out_features % 16 == 0


def frozen_linear(model: nn.Module) -> nn.Linear:
    """The first linear layer, in its base form where LoRA wraps it; the dtype it computes in is the run's precision."""
    return next(m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lora_" not in n)


def what_ran(trainer: LabTrainer) -> dict[str, Any]:
    """Precision, dtypes, strategy and sizes as they are, for run.json."""
    model, accelerator = trainer.model, trainer.accelerator
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return {
        "precision": PRECISIONS[accelerator.mixed_precision],
        "compute": trainer.observed,
        "tf32": torch.backends.cuda.matmul.allow_tf32 if torch.cuda.is_available() else None,
        "trainable_parameters": sum(p.numel() for p in trained),
        "trainable_dtypes": _dtypes(trained),
        "frozen_dtypes": _dtypes(frozen),
        "quantization": _quantization(model),
        "strategy": strategy(trainer),
        "gradients_reduced_in": _reduce_dtype(trainer, trained),
        "world_size": accelerator.num_processes,
        "device": str(accelerator.device.type),
        "lora_scale": lora_scale(model),
        "attn_implementation": model.config._attn_implementation,
        "micro_batch": trainer.args.per_device_train_batch_size,
        "accumulation": trainer.args.gradient_accumulation_steps,
        "global_batch": trainer.global_batch,
    }


def strategy(trainer: SFTTrainer) -> str:
    """single, ddp, fsdp1 or fsdp2, from the wrapped model itself."""
    if trainer.accelerator.distributed_type == DistributedType.FSDP:
        return f"fsdp{trainer.accelerator.state.fsdp_plugin.fsdp_version}"
    wrapped = isinstance(trainer.model_wrapped, DistributedDataParallel)
    return "ddp" if wrapped else "single" if trainer.accelerator.num_processes == 1 else "none"


def lora_scale(model: nn.Module) -> list[float]:
    """The factors that the LoRA updates are multiplied with (alpha / r; one value unless layers differ)."""
    return sorted({scale for m in model.modules() if isinstance(m, LoraLayer) for scale in m.scaling.values()})


def _quantization(model: nn.Module) -> str | None:
    if getattr(model, "is_loaded_in_4bit", False):
        return "4bit"
    return "8bit" if getattr(model, "is_loaded_in_8bit", False) else None


def _dtypes(parameters: list[nn.Parameter]) -> list[str]:
    return sorted({str(p.dtype).removeprefix("torch.") for p in parameters})


def _reduce_dtype(trainer: SFTTrainer, trained: list[nn.Parameter]) -> str | None:
    if trainer.accelerator.num_processes == 1:
        return None
    policy = trainer.accelerator.state.fsdp_plugin.mixed_precision_policy if trainer.is_fsdp_enabled else None
    return str(getattr(policy, "reduce_dtype", None) or trained[0].dtype).removeprefix("torch.")


def _verify_strategy(trainer: LabTrainer) -> None:
    launch, ran, processes = trainer.launch, strategy(trainer), trainer.accelerator.num_processes
    if not ran.startswith(launch.strategy) or processes != launch.world_size:
        raise RuntimeError(
            f"the launch config asks for {launch.strategy} over {launch.world_size} processes; what runs is {ran} over "
            f"{processes}"
        )


def _verify_precision(trainer: LabTrainer) -> None:
    precision = PRECISIONS[trainer.accelerator.mixed_precision]
    asked, linear, dtype = trainer.launch.precision or precision, *trainer.observed.values()
    if precision != asked or dtype != COMPUTE_DTYPE[asked]:
        raise RuntimeError(
            f"the launch config asks for {asked}; accelerate runs {precision} and the linears compute in {dtype}"
        )
    if asked == "fp8" and linear != "Float8Linear":
        raise RuntimeError(f"the launch config asks for fp8; the linears run as {linear}")


def length_facts(trainer: SFTTrainer, rows: int) -> dict[str, int]:
    """Sequences and tokens that training sees of `rows` rows, and what `max_length` did to them.

    `cut` rows lost the end of their response and so their end token; `dropped` rows had no response token left.
    """
    packed = trainer.args.packing
    lengths = pc.list_value_length(trainer.train_dataset.with_format("arrow")[:]["input_ids"]).to_numpy()
    at_limit = [] if packed else np.flatnonzero(lengths == trainer.args.max_length)
    eos = trainer.processing_class.eos_token_id
    return {
        "sequences": len(lengths),
        "tokens": int(lengths.sum()),
        "longest": int(lengths.max()),
        "cut": sum(trainer.train_dataset[int(i)]["input_ids"][-1] != eos for i in at_limit),
        "dropped": 0 if packed else rows - len(lengths),
        "left_over_an_epoch": len(lengths) % trainer.global_batch,
    }
