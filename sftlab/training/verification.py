"""What really runs: precision, strategy, dtypes and sizes, read from the trainer and checked."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments
from trl import SFTTrainer

from sftlab.config.launch import COMPUTE_DTYPE, PRECISIONS, Launch
from sftlab.fastpath.lora_mlp import LoraMlp
from sftlab.fastpath.selection import FastPath
from sftlab.models.inner_model import inner_model
from sftlab.models.loading import LINEAR_LAYERS


class FirstStepCheck:
    """Compares what runs with the launch config, once, before the first step of a start.

    `observed` holds the class and the output dtype of a frozen linear; after a resume, those of the
    start before until this one has made its own check.
    """

    def __init__(self, launch: Launch) -> None:
        self.observed: dict[str, str] = {}
        self.done = False
        self._launch = launch

    def run(
        self,
        trainer: SFTTrainer,
        model: nn.Module,
        trained: Sequence[nn.Parameter],
        forward: Callable[[], object],
    ) -> None:
        """Check strategy, trained parameters and precision; `forward` runs the wrapped model.

        Raises RuntimeError if one of them is not what the launch config asks for.
        """
        verify_strategy(trainer, self._launch)
        verify_trained(model, trained)
        self.observed = observe_linear(trainer, model, forward)
        verify_precision(trainer.accelerator.mixed_precision, self._launch, self.observed)
        self.done = True

    def state(self) -> dict[str, Any]:
        """Returns what was observed."""
        return self.observed

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what the start before observed."""
        self.observed = state


def verify_strategy(trainer: SFTTrainer, launch: Launch) -> None:
    """Raise RuntimeError if strategy or world size differ from the launch config's."""
    runs, processes = strategy(trainer), trainer.accelerator.num_processes
    if not runs.startswith(launch.strategy) or processes != launch.world_size:
        raise RuntimeError(
            f"the launch config asks for {launch.strategy} over {launch.world_size} processes; "
            f"what runs is {runs} over {processes}"
        )


def verify_trained(model: nn.Module, trained: Sequence[nn.Parameter]) -> None:
    """Raise RuntimeError if a parameter has a gradient but is not among `trained`.

    The optimizer has those; a wrapper of the model may have unfrozen others.
    """
    kept = set(map(id, trained))
    left = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in kept]
    if left:
        raise RuntimeError(
            f"{len(left)} parameters would be trained but no optimizer has them, first {left[0]}"
        )


def verify_precision(mixed_precision: str, launch: Launch, observed: Mapping[str, str]) -> None:
    """Raise RuntimeError if the linears do not compute in the launch config's precision.

    `mixed_precision` is accelerate's, `observed` is `observe_linear`'s.
    """
    precision = PRECISIONS[mixed_precision]
    asked, linear, dtype = launch.precision or precision, *observed.values()
    if precision != asked or dtype != COMPUTE_DTYPE[asked]:
        raise RuntimeError(
            f"the launch config asks for {asked}; accelerate runs {precision} and the linears "
            f"compute in {dtype}"
        )
    if asked == "fp8" and "Float8Linear" not in linear:
        raise RuntimeError(f"the launch config asks for fp8; the linears run as {linear}")


def verify_gradients(model: nn.Module) -> str | None:
    """Returns which LoRA layers got no gradient from a backward, in a sentence; None if all did.

    Such a layer is not called, so LoRA on it has no effect. Experts are left out, which no token
    may have come to. Raises RuntimeError where that is so of all layers of a name.
    """
    trained: dict[str, list[tuple[str, bool]]] = {}
    for name, layer in model.named_modules():
        matrices = [p for n, p in layer.named_parameters() if "lora_" in n and p.requires_grad]
        if isinstance(layer, LoraLayer) and matrices and "experts" not in name:
            used = any(p.grad is not None for p in matrices)
            trained.setdefault(name.rpartition(".")[2], []).append((name, used))
    unused = [name for layers in trained.values() for name, used in layers if not used]
    if not unused:
        return None
    whole = [target for target, layers in trained.items() if not any(u for _, u in layers)]
    if whole:
        raise RuntimeError(
            f"LoRA on {', '.join(whole)} has no effect: the first step gave such layers no "
            "gradient, as the model's forward does not call them; leave them out with "
            f"--exclude_modules {' '.join(whole)}"
        )
    count = sum(map(len, trained.values()))
    return (
        f"{len(unused)} of {count} LoRA layers get no gradient, first {unused[0]}: the model's "
        "forward does not call them"
    )


class _Observed(Exception):
    """Ends a forward that has reached the linear it was run for."""


def observe_linear(
    trainer: SFTTrainer, model: nn.Module, forward: Callable[[], object]
) -> dict[str, str]:
    """Returns class and output dtype of the first frozen linear that `forward` runs through.

    The forward is not compiled, takes no gradients, and leaves the random state as it was. It ends
    at the linear, except under FSDP, whose forwards must not be cut short.
    """
    observed: dict[str, str] = {}

    def note(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        dtype = str(output.dtype).removeprefix("torch.")
        observed.update(linear=type(module).__name__, output_dtype=dtype)
        if not trainer.is_fsdp_enabled:
            raise _Observed

    hook = _frozen_linear(model).register_forward_hook(note)
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    as_in_training = trainer.compute_loss_context_manager()
    eager = torch.compiler.set_stance("force_eager")
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), as_in_training, eager:
            forward()
    except _Observed:
        pass
    finally:
        hook.remove()
    return observed


def _frozen_linear(model: nn.Module) -> nn.Module:
    # The first linear, or the base of the first one that LoRA wraps. Under fp8 some 4-bit linears
    # may multiply in 16 bits, which the run has said: then it is the first one that does not.
    linears = [
        m for n, m in model.named_modules() if isinstance(m, LINEAR_LAYERS) and "lora_" not in n
    ]
    return next((one for one in linears if type(one).__name__ == "Float8Linear4bit"), linears[0])


def what_ran(trainer: SFTTrainer, fast: FastPath, observed: Mapping[str, str]) -> dict[str, Any]:
    """Returns precision, dtypes, strategy and sizes as they are, for run.json."""
    model, accelerator, args = trainer.model, trainer.accelerator, trainer.args
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    whole = getattr(inner_model(model), "text_of", None)
    return {
        **({"text_of": whole} if whole else {}),
        "precision": PRECISIONS[accelerator.mixed_precision],
        "compute": dict(observed),
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
        "lora_scale": lora_scales(model),
        "attn_implementation": model.config._attn_implementation,
        "packing": fast.packing,
        **({"attention_tile": fast.attention_tile} if fast.packing else {}),
        "compile_layers": fast.compile_layers,
        "fused_lora": fast.fused_lora,
        **({"kernels_with_lora": _kernels_have_lora(model)} if fast.fused_lora else {}),
        "fused_loss": fast.fused_loss,
        **({"float8_head": fast.float8_head} if accelerator.mixed_precision == "fp8" else {}),
        **({"fsdp_layers_per_unit": fast.layers_per_unit} if fast.layers_per_unit else {}),
        "captured_step": fast.captured_step,
        **({"experts_implementation": fast.experts} if fast.experts else {}),
        **({"experts_lora": fast.experts_lora} if fast.experts_lora else {}),
        **({"mixers": fast.mixers} if fast.mixers else {}),
        **({"four_bit_weights": fast.four_bit_weights} if fast.four_bit_weights else {}),
        "micro_batch": args.per_device_train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "global_batch": global_batch(args),
    }


def _kernels_have_lora(model: nn.Module) -> bool:
    return any(m.kernels_have_lora for m in model.modules() if isinstance(m, LoraMlp))


def global_batch(args: TrainingArguments) -> int:
    """Returns the rows of an optimizer step, over all processes."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def strategy(trainer: SFTTrainer) -> str:
    """Returns single, ddp, fsdp1 or fsdp2, read from the wrapped model itself."""
    if trainer.accelerator.distributed_type == DistributedType.FSDP:
        return f"fsdp{trainer.accelerator.state.fsdp_plugin.fsdp_version}"
    if isinstance(trainer.model_wrapped, DistributedDataParallel):
        return "ddp"
    return "single" if trainer.accelerator.num_processes == 1 else "none"


def tf32_products() -> bool:
    """Returns whether float32 matrix products on a GPU may round their inputs to TF32.

    torch's older setting raises once transformers has used the newer one, which is read here.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def lora_scales(model: nn.Module) -> list[float]:
    """Returns the distinct factors of the LoRA updates: one, unless layers differ."""
    layers = (module for module in model.modules() if isinstance(module, LoraLayer))
    return sorted({scale for layer in layers for scale in layer.scaling.values()})


def _quantization(model: nn.Module) -> str | None:
    if getattr(model, "is_loaded_in_4bit", False):
        return "4bit"
    return "8bit" if getattr(model, "is_loaded_in_8bit", False) else None


def _dtypes(parameters: list[nn.Parameter]) -> list[str]:
    return sorted({str(p.dtype).removeprefix("torch.") for p in parameters})


def _reduce_dtype(trainer: SFTTrainer, trained: list[nn.Parameter]) -> str | None:
    if trainer.accelerator.num_processes == 1:
        return None
    reduced = trained[0].dtype
    if trainer.is_fsdp_enabled:
        plugin = trainer.accelerator.state.fsdp_plugin
        if plugin.fsdp_version == 1 or any(isinstance(p, DTensor) for p in trained):
            reduced = getattr(plugin.mixed_precision_policy, "reduce_dtype", None) or reduced
    return str(reduced).removeprefix("torch.")
