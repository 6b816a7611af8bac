"""The step of a recipe: its sizes and weights, and layers worked out or measured.

Llama's layers, and those that keep as much, are worked out from their sizes: their speed and memory
were fitted on GPUs. All others are measured on tensors without numbers.
"""

import math
import re
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Trainer

from sftlab.config.launch import COMPUTE_DTYPE, PRECISIONS, Launch
from sftlab.config.recipe import ModelArguments, Recipe
from sftlab.config.validation import is_bitsandbytes
from sftlab.fastpath import varlen_attention
from sftlab.fastpath.float8_mlp_ops import LARGEST_SIZE
from sftlab.fastpath.fsdp_units import layers_per_unit
from sftlab.fastpath.fused_loss import needs_whole_logits
from sftlab.fastpath.selection import FastPath
from sftlab.models.adapter_names import is_target
from sftlab.models.gated_mlp import NAMES
from sftlab.models.layers import Layers, decoder_of
from sftlab.models.plain_attention import PACKED
from sftlab.planning.measured_layers import Measured, Rows, measured
from sftlab.planning.row_lengths import RowLengths, of_encoded
from sftlab.planning.step import Shape, Step
from sftlab.planning.step_memory import kept_bytes, recomputed_norms
from sftlab.planning.weight_memory import (
    FUSED,
    LINEARS,
    Weights,
    build_on_meta,
    count_weights,
    on_meta,
)

# How far what is worked out may be from what autograd saves.
NEAR = 0.02
# What was found, by everything that it depends on.
_FOUND: dict[tuple, Measured] = {}
_WORKED_OUT: dict[str, bool] = {}


def step_of(
    recipe: Recipe,
    config: PreTrainedConfig,
    launch: Launch,
    fast: FastPath,
    tokens: int,
    rows: RowLengths,
) -> Step:
    """Returns the step of a recipe under a launch config.

    A micro-batch has `tokens` in `rows`. Raises ValueError for a recipe that no plan is made for.
    """
    model, training = recipe.model, recipe.training
    if training.fused_loss is False and training.method != "dpo":
        raise ValueError(
            "fused_loss: false keeps whole logits, and plans are made for the fused loss alone: "
            "leave fused_loss out"
        )
    if training.method != "dpo" and (whole := needs_whole_logits(training)):
        raise ValueError(
            f"the loss is not fused ({whole}), and plans are made for the fused loss alone: no "
            "plan is made"
        )
    rounded = training.mixed_precision == "fp8" and (model.lora_dropout or model.load_in_4bit)
    if training.fused_lora and model.use_peft and rounded:
        raise ValueError(
            "fused_lora under fp8 is for weights that are not in 4 bits, and LoRA without dropout: "
            "leave fused_lora out"
        )
    weights, shape = count_weights(recipe, config), Shape.of(config, fast.layers)
    if fast.layers.mixture:
        _refuse_mixture(recipe)
    targets = _targets(model, fast.layers)
    known = shape is not None and targets is not None
    worked_out = known and not (weights.other or weights.on_parameters)
    if worked_out and _keeps_what_is_worked_out(recipe, config, fast.layers, shape):
        if shape.experts:
            targets = targets & {"q_proj", "k_proj", "v_proj", "o_proj"}
        return _step(recipe, launch, fast, tokens, rows, weights, shape, targets)
    found = _measured(recipe, config, fast, rows)
    if fast.fused_lora and known and fast.layers.alike_and_gated:
        # its linears are Llama's, whatever else the layer keeps
        one = _step(recipe, launch, fast, tokens, rows, weights, shape, targets)
        more = kept_bytes(one) - kept_bytes(replace(one, fused_lora=False))
        again = found.again + one.compute_bytes * shape.hidden * sum(recomputed_norms(one))
        found = found._replace(kept=found.kept + more, largest=found.largest + more, again=again)
    elif training.fused_lora:
        name = config.get_text_config().model_type
        raise ValueError(f"no plan is made for fused_lora of {name}: leave fused_lora out")
    shape = Shape.of_measured(config, fast.layers)
    step = _step(recipe, launch, fast, tokens, rows, weights, shape, frozenset())
    return replace(step, measured=found)


def step_of_trainer(recipe: Recipe, launch: Launch, fast: FastPath, trainer: Trainer) -> Step:
    """Returns the average micro-batch of a training that is set up, for `is_captured` alone.

    Nothing is counted on the meta device, which would take seconds of every start.
    """
    rows, layers = of_encoded(trainer.train_dataset), fast.layers.count
    adapters = sum(name.endswith(".lora_A") for name, _ in trainer.model.named_modules())
    named = frozenset(f"adapter {n}" for n in range(round(adapters / layers)))
    tokens = round(recipe.training.per_device_train_batch_size * rows.mean)
    shape, weights = Shape(0, 0, layers, 0, 0, 0, 0), Weights(*[0] * 10, trainer.flops)
    return _step(recipe, launch, fast, tokens, rows, weights, shape, named)


def _step(
    recipe: Recipe,
    launch: Launch,
    fast: FastPath,
    tokens: int,
    rows: RowLengths,
    weights: Weights,
    shape: Shape,
    targets: frozenset[str],
) -> Step:
    model, training = recipe.model, recipe.training
    pairs = training.method == "dpo"  # its log-probabilities come in chunks
    once = pairs and training.reference_once(rows.count, recipe.data.global_batch_size)
    return Step(
        shape=shape,
        weights=weights,
        precision=PRECISIONS[training.mixed_precision],
        targets=targets,
        rank=model.lora_r if model.use_peft else 0,
        tokens=tokens,
        row_length=rows.attended,
        strategy=launch.strategy,
        processes=launch.world_size,
        quantized=bool(model.load_in_4bit),
        weight_bytes=torch.finfo(getattr(torch, model.dtype)).bits // 8,
        checkpointing=bool(training.gradient_checkpointing),
        compiled=fast.compile_layers,
        packed=fast.packing,
        dropout=model.lora_dropout > 0 and model.use_peft,
        reshard=launch.settings.get("FSDP_RESHARD_AFTER_FORWARD", "true") == "true",
        layers_per_unit=training.fsdp_layers_per_unit
        or layers_per_unit(shape.layers, weights.layer),
        accumulation=training.gradient_accumulation_steps,
        optimizer_copies=training.optim == "adamw_torch",
        updates_by_tensor=is_bitsandbytes(training.optim),
        reference=pairs and not once,
        reference_adapter=pairs and bool(model.adapter_name_or_path),
        reference_once=once,
        fused_lora=fast.fused_lora,
        float8_mlp=_has_float8_mlp(recipe, fast, shape, targets),
        float8_head=training.mixed_precision == "fp8"
        and not pairs
        and shape.hidden % 16 == shape.vocabulary % 16 == 0,
        captured=fast.captured_step,
        may_capture=fast.may_capture_step,
        steps=steps_of(recipe, rows),
    )


def _has_float8_mlp(recipe: Recipe, fast: FastPath, shape: Shape, targets: frozenset[str]) -> bool:
    """Whether the MLP over float8 weights is one function: see fuse_float8_mlps."""
    if recipe.training.mixed_precision != "fp8" or not fast.compile_layers:
        return False
    model = recipe.model
    # preference tuning from an adapter has a copy of it beside
    two = recipe.training.method == "dpo" and bool(model.adapter_name_or_path)
    other = model.use_peft and (model.lora_dropout > 0 or model.lora_bias or two)
    if other and targets & set(NAMES):
        return False
    return fast.layers.alike_and_gated and shape.mlp <= LARGEST_SIZE


def steps_of(recipe: Recipe, rows: RowLengths) -> int | None:
    """Returns the optimizer steps of a training; None where the number of rows is unknown."""
    if recipe.training.max_steps > 0:
        return recipe.training.max_steps
    if rows.count is None:
        return None
    return int(rows.count // recipe.data.global_batch_size * recipe.training.num_train_epochs)


def _targets(model: ModelArguments, layers: Layers) -> frozenset[str] | None:
    """Returns the linears that train, with LoRA or whole, under Llama's names.

    None where one of them has another name, or some are left out.
    """
    names = model.lora_target_modules or []
    if names == "all-linear" or not model.use_peft:
        names = LINEARS
    is_pattern = isinstance(names, str) and not re.fullmatch(r"[\w.]+", names)
    if model.use_peft and (model.exclude_modules or is_pattern):
        names = _ends(model, layers)
        if names is None:
            return None
    names = [names] if isinstance(names, str) else names
    ends = (name.rpartition(".")[2] for name in names)
    targets = frozenset(one for end in ends for one in FUSED.get(end, (end,)))
    return targets if targets <= set(LINEARS) else None


def _ends(model: ModelArguments, layers: Layers) -> set[str] | None:
    """Returns the last parts of the names of linears with LoRA.

    None where a linear of such a name has none, or where none has.
    """
    adapted = {name for name in layers.linears if is_target(model, name)}
    ends = {name.rpartition(".")[2] for name in adapted}
    whole = all(name in adapted for name in layers.linears if name.rpartition(".")[2] in ends)
    return ends if ends and whole else None


def _refuse_mixture(recipe: Recipe) -> None:
    """Raise ValueError for a training of a mixture of experts that no plan is made for.

    Plans know the grouped product of experts alone, which takes bfloat16.
    """
    if not recipe.model.use_peft:
        raise ValueError("no plan is made for full fine-tuning of a mixture of experts")
    precision = PRECISIONS[recipe.training.mixed_precision]
    if recipe.model.dtype != "bfloat16" or precision != "bf16":
        raise ValueError(
            "plans of mixtures of experts are made for bf16 alone: pass --dtype bfloat16 "
            "--mixed_precision bf16"
        )


def _keeps_what_is_worked_out(
    recipe: Recipe, config: PreTrainedConfig, layers: Layers, shape: Shape
) -> bool:
    """Whether a layer without LoRA keeps what `kept_bytes` says; True where it cannot be tried."""
    if not layers.attention:
        return True
    key = config.to_json_string()
    if key not in _WORKED_OUT:
        varlen_attention.register()
        model = build_on_meta(recipe, config, torch.bfloat16, PACKED).requires_grad_(False)
        step = Step(
            shape, Weights(*[0] * 10, None), "bf16", frozenset(), 0, 64, 64.0, compiled=False
        )
        try:
            found = measured(model, model, Rows(64, 64, packed=True), True, False).kept
        except ValueError:
            found = math.inf
        _WORKED_OUT[key] = math.isclose(found, kept_bytes(step), rel_tol=NEAR)
    return _WORKED_OUT[key]


def _refuse_adapted_head(model: nn.Module, base: PreTrainedModel) -> None:
    """Raise ValueError for LoRA on what comes after the decoder, which is not run."""
    within = {id(one) for one in decoder_of(base).parameters()}
    named = ((name, one) for name, one in model.named_parameters() if ".lora_" in name)
    ends = sorted(
        {n.split(".lora_")[0].split(".")[-1] for n, one in named if id(one) not in within}
    )
    if ends:
        raise ValueError(f"LoRA on {', '.join(ends)}: no plan is made for LoRA on the head")


def _measured(
    recipe: Recipe, config: PreTrainedConfig, fast: FastPath, rows: RowLengths
) -> Measured:
    """Returns what the layers of a recipe's model take, found once for all plans that share it."""
    name = config.get_text_config().model_type
    if fast.layers.without_packed_form[1] > 0:
        raise ValueError(
            f"{name} has layers that carry a state and have no packed form: no plan is made for it"
        )
    # a side of a pair is a row to the model
    lengths = (rows.mean / rows.sequences, rows.longest / rows.sequences)
    asked = Rows(*(max(1, round(one)) for one in lengths), packed=fast.packing)
    training = recipe.training
    casts = COMPUTE_DTYPE[PRECISIONS[training.mixed_precision]] != "float32"
    key = (config.to_json_string(), repr(recipe.model), training.max_length, casts, asked)
    # LoRA in float32 has copies of what norms make
    cast = recipe.model.use_peft and casts and not recipe.model.load_in_4bit
    again = fast.compile_layers and not (training.gradient_checkpointing or cast)
    key = (*key, fast.compile_layers, again)
    if key not in _FOUND:
        attention = PACKED if fast.packing else recipe.model.attn_implementation
        varlen_attention.register(training.max_length)
        model, _ = on_meta(recipe, config, attention)
        base = model.get_base_model() if recipe.model.use_peft else model
        _refuse_adapted_head(model, base)
        if recipe.model.load_in_4bit:  # trl makes LoRA bfloat16 then, and no product is cast
            casts = False
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        _FOUND[key] = measured(model, base, asked, casts, fast.compile_layers, again)
    return _FOUND[key]
