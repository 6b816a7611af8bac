"""What really ran: precision, strategy, dtypes and sizes, read from the trainer's own objects, and
checked.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from trl import SFTTrainer

from sftlab.config.launch import COMPUTE_DTYPE, PRECISIONS
from sftlab.data.samplers import refuse_few_rows, row_lengths
from sftlab.data.splits import Splits
from sftlab.models.loading import LINEAR_LAYERS

if TYPE_CHECKING:
    from sftlab.training.trainer import LabTrainer


def frozen_linear(model: nn.Module) -> nn.Module:
    """The first linear layer, in its base form where LoRA wraps it.

    The dtype it computes in is the run's precision.
    """
    return next(
        m for n, m in model.named_modules() if isinstance(m, LINEAR_LAYERS) and "lora_" not in n
    )


class _SeenError(Exception):
    """Ends a forward that has shown what it was for."""


def seen_linear(trainer: "LabTrainer", model: nn.Module, inputs: dict[str, Any]) -> dict[str, str]:
    """Class and output dtype of a frozen linear, seen in an uncompiled forward that goes as far as
    need be.

    Leaves the random state alone.
    """
    seen: dict[str, str] = {}

    def note(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        seen.update(
            linear=type(module).__name__, output_dtype=str(output.dtype).removeprefix("torch.")
        )
        if not trainer.is_fsdp_enabled:  # which wants every forward to end
            raise _SeenError

    hook = frozen_linear(model).register_forward_hook(note)
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    as_it_trains, eager = (
        trainer.compute_loss_context_manager(),
        torch.compiler.set_stance("force_eager"),
    )
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), as_it_trains, eager:
            trainer.token_losses(model.train(), trainer._prepare_inputs(inputs))
    except _SeenError:
        pass
    finally:
        hook.remove()
    return seen


def tf32_products() -> bool:
    """Whether float32 matrix products on a GPU may round their inputs to TF32.

    Asked in torch's newer way: the older one raises once transformers has set it in the newer.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def what_ran(trainer: "LabTrainer") -> dict[str, Any]:
    """Precision, dtypes, strategy and sizes as they are, for run.json."""
    model, accelerator = trainer.model, trainer.accelerator
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return {
        "precision": PRECISIONS[accelerator.mixed_precision],
        "compute": trainer.observed,
        "tf32": tf32_products() if torch.cuda.is_available() else None,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
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
        "packing": trainer.fast.packing,
        "compile_layers": trainer.fast.compile_layers,
        "fused_loss": trainer.fast.fused_loss,
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
    """The factors that the LoRA updates are multiplied with (alpha / r.

    One value unless layers differ).
    """
    return sorted(
        {scale for m in model.modules() if isinstance(m, LoraLayer) for scale in m.scaling.values()}
    )


def _quantization(model: nn.Module) -> str | None:
    if getattr(model, "is_loaded_in_4bit", False):
        return "4bit"
    return "8bit" if getattr(model, "is_loaded_in_8bit", False) else None


def _dtypes(parameters: list[nn.Parameter]) -> list[str]:
    return sorted({str(p.dtype).removeprefix("torch.") for p in parameters})


def _reduce_dtype(trainer: "LabTrainer", trained: list[nn.Parameter]) -> str | None:
    if trainer.accelerator.num_processes == 1:
        return None
    sharded = trainer.is_fsdp_enabled and not trainer.replicated
    policy = trainer.accelerator.state.fsdp_plugin.mixed_precision_policy if sharded else None
    return str(getattr(policy, "reduce_dtype", None) or trained[0].dtype).removeprefix("torch.")


def verify_strategy(trainer: "LabTrainer") -> None:
    launch, ran, processes = trainer.launch, strategy(trainer), trainer.accelerator.num_processes
    if not ran.startswith(launch.strategy) or processes != launch.world_size:
        raise RuntimeError(
            f"the launch config asks for {launch.strategy} over {launch.world_size} processes; "
            f"what runs is {ran} over "
            f"{processes}"
        )


def verify_trained(model: nn.Module, trained: Sequence[nn.Parameter]) -> None:
    """Raise RuntimeError where parameters have gradients that no optimizer takes:

    what wraps the model unfroze them.
    """
    kept = set(map(id, trained))
    left = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in kept]
    if left:
        raise RuntimeError(
            f"{len(left)} parameters have gradients and no optimizer, {left[0]} the first"
        )


def verify_precision(trainer: "LabTrainer") -> None:
    precision = PRECISIONS[trainer.accelerator.mixed_precision]
    asked, linear, dtype = trainer.launch.precision or precision, *trainer.observed.values()
    if precision != asked or dtype != COMPUTE_DTYPE[asked]:
        raise RuntimeError(
            f"the launch config asks for {asked}; accelerate runs {precision} and the linears "
            f"compute in {dtype}"
        )
    if asked == "fp8" and "Float8Linear" not in linear:
        raise RuntimeError(f"the launch config asks for fp8; the linears run as {linear}")


def length_facts(trainer: SFTTrainer, rows: int) -> dict[str, int]:
    """Sequences and tokens that training sees of `rows` rows, and what `max_length` did to them.

    `cut` rows lost the end of their response and so their end token; `dropped` rows had no response
    token left.
    """
    lengths = row_lengths(trainer.train_dataset)
    at_limit = np.flatnonzero(lengths == trainer.args.max_length)
    eos = trainer.processing_class.eos_token_id
    return {
        "sequences": len(lengths),
        "tokens": int(lengths.sum()),
        "longest": int(lengths.max()),
        "cut": sum(trainer.train_dataset[int(i)]["input_ids"][-1] != eos for i in at_limit),
        "dropped": rows - len(lengths),
        "left_over_an_epoch": len(lengths) % trainer.global_batch,
    }


def refuse_lost_rows(trainer: "LabTrainer", splits: Splits) -> None:
    """Raise ValueError where `max_length` left too few training rows for a step, or no validation
    row.
    """
    said = f"have no response token within max_length {trainer.args.max_length}"
    if isinstance(trainer.train_dataset, Dataset):
        rows, kept = len(splits.train), len(trainer.train_dataset)
        refuse_few_rows(
            kept, trainer.global_batch, f" ({rows - kept} of {rows} {said})" if kept < rows else ""
        )
    if trainer.eval_dataset is not None and not len(trainer.eval_dataset):
        raise ValueError(
            f"all {len(splits.validation)} validation rows {said}: raise it, or leave validation "
            "out (split_fractions)"
        )
