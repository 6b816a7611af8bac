"""FSDP2's units: how many consecutive decoder layers are gathered and freed together.

A unit costs the host its hooks and its collectives, in the forward and in the backward, whatever it
holds. Where layers are small that is more than their own work, so several make one unit.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch import nn
from torch.distributed import fsdp
from transformers import PreTrainedModel, TrainingArguments

from sftlab.fastpath.compile_layers import decoder_layers
from sftlab.fastpath.selection import FastPath
from sftlab.models.inner_model import inner_model

# Bytes of a unit of several layers, at most. Up to three are there at once: the working one, the
# next one and the buffer that it arrives in.
UNIT_BYTES = 500_000_000
# A model has so many units where it has as many layers: the first of one is gathered in vain else.
FEWEST_UNITS = 2


def layers_per_unit(layers: int, layer_bytes: int) -> int:
    """Returns how many consecutive decoder layers make a unit.

    A model has so many `layers`, and one gathers at most `layer_bytes`.
    """
    return max(1, min(UNIT_BYTES // max(layer_bytes, 1), -(-layers // FEWEST_UNITS)))


def units_of(layers: Sequence[nn.Module], size: int) -> list[list[nn.Module]]:
    """Returns the units of `size` layers, in order; the last one may have fewer."""
    return [list(layers[start : start + size]) for start in range(0, len(layers), size)]


def gathered_bytes(layer: nn.Module, plugin: FullyShardedDataParallelPlugin) -> int:
    """Returns the bytes of a decoder layer's weights as FSDP2 gathers them.

    Weights that stay whole on every process are not gathered: LoRA matrices, where nothing else
    trains, and 4-bit weights that are stored as integers.
    """
    policy = plugin.mixed_precision_policy
    compute = policy.param_dtype if policy else None
    whole = plugin.ignored_modules is not None
    return sum(
        p.numel() * (compute or p.dtype).itemsize
        for p in layer.parameters()
        if p.is_floating_point() and not (whole and p.requires_grad)
    )


def take_units(
    model: nn.Module,
    fast: FastPath,
    plugin: FullyShardedDataParallelPlugin,
    args: TrainingArguments,
) -> None:
    """Choose how many decoder layers make a unit, before the model is sharded.

    Note why it is one where several are not possible. `fsdp_layers_per_unit` of `args` sets the
    number. Raises ValueError where it asks for several in vain, or for more than there are.
    """
    layers, asked = decoder_layers(inner_model(model)), args.fsdp_layers_per_unit
    reason = _why_alone(model, layers, plugin, args)
    if asked is not None and asked > 1 and reason:
        raise ValueError(
            f"fsdp_layers_per_unit is {asked}, and here a unit has one layer: {reason}; leave it "
            "out of the recipe"
        )
    if asked is not None and asked > len(layers) > 0:
        raise ValueError(
            f"fsdp_layers_per_unit is {asked}, and the model has {len(layers)} decoder layers"
        )
    if reason:
        fast.layers_per_unit, fast.reasons["fsdp_layers_per_unit"] = 1, reason
        return
    largest = max(gathered_bytes(layer, plugin) for layer in layers)
    fast.layers_per_unit = asked or layers_per_unit(len(layers), largest)


def _why_alone(
    model: nn.Module,
    layers: Sequence[nn.Module],
    plugin: FullyShardedDataParallelPlugin,
    args: TrainingArguments,
) -> str | None:
    if not layers:
        return f"{type(model).__name__} has no list of decoder layers"
    if plugin.activation_checkpointing:
        return "fsdp_activation_checkpointing wraps every layer"
    reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    if args.gradient_checkpointing and reentrant:
        return "reentrant checkpointing begins a backward within a unit's"
    plugin.set_auto_wrap_policy(model)
    is_unit = fsdp2_prepare_auto_wrap_policy(plugin, model)
    if is_unit is None or not all(map(is_unit, layers)):
        return "fsdp_auto_wrap_policy does not make every decoder layer a unit"
    if any(is_unit(part) for layer in layers for part in layer.modules() if part is not layer):
        return "fsdp_auto_wrap_policy makes parts of a decoder layer units too"
    return None


@contextmanager
def layers_in_units(model: PreTrainedModel, size: int) -> Iterator[None]:
    """accelerate shards `size` consecutive decoder layers as one unit while the context lasts.

    accelerate, utils/fsdp_utils.py, `fsdp2_prepare_model` calls `fully_shard` for every module that
    the policy names and that is not in a unit yet, and knows units of one module alone. Delete when
    its policy can name several.
    """
    units = units_of(decoder_layers(model), size) if size > 1 else []
    unit_of = {id(layer): unit for unit in units for layer in unit}
    plain = fsdp.fully_shard

    def shard(module: nn.Module | list[nn.Module], **kwargs: object) -> object:
        unit = unit_of.get(id(module), [])
        return plain(unit if len(unit) > 1 else module, **kwargs)

    fsdp.fully_shard = shard
    try:
        yield
    finally:
        fsdp.fully_shard = plain
