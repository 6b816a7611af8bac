"""Bytes of weights, gradients and optimizer state, counted on the meta device:

exact, and nothing is loaded.
"""

import copy
from typing import NamedTuple

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from trl import get_peft_config

from sftlab.config.launch import COMPUTE_DTYPE, PRECISIONS
from sftlab.config.recipe import Recipe
from sftlab.measurement.flops import Flops, flops_per_token
from sftlab.models.loading import LINEAR_LAYERS

# The linears of a decoder layer of Llama's kind.
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Weights(NamedTuple):
    """What a rank holds before any sharding, in bytes: the base model, adapter, gradients and
    optimizer state.

    `layer` and `tail` are what FSDP2 gathers as one: a decoder layer, and the head with the last
    norm. Elements of matrices: `trained` and `frozen` of the model, `linears` of one layer without
    its adapter, `head`.
    """

    base: int
    adapter: int
    gradients: int
    optimizer_state: int
    layer: int
    tail: int
    trained: int
    frozen: int
    linears: int
    head: int
    flops: Flops


def weigh(recipe: Recipe, config: PreTrainedConfig) -> Weights:
    """Count the weights of a recipe's model, its adapter, gradients and optimizer state on the meta
    device.

    ValueError for a model whose layers are not of Llama's kind, weights in 8 bits, or an optimizer
    that is not known.
    """
    if recipe.model.load_in_8bit:
        raise ValueError(
            "no plan is made for weights in 8 bits: those in 4 bits and unquantized ones are known"
        )
    trust, config = recipe.training.trust_remote_code, copy.deepcopy(config)
    if hasattr(config, "quantization_config"):  # of a model that was loaded in 4 bits
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust, dtype=recipe.model.dtype
        )
        base = {id(p) for p in model.parameters()}
        peft_config = get_peft_config(recipe.model)
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
    quantized, precision = recipe.model.load_in_4bit, recipe.training.mixed_precision
    linears = {id(m.weight): m for n, m in model.named_modules() if _is_frozen_linear(n, m)}

    def size(parameter: nn.Parameter) -> int:
        if id(parameter) in linears and quantized:
            return packed_bytes(parameter.numel(), recipe.model.use_bnb_nested_quant)
        return parameter.numel() * (
            2 if id(parameter) in linears and precision == "fp8" else parameter.element_size()
        )

    adapter = [p for p in model.parameters() if id(p) not in base]
    trained = [p for p in model.parameters() if p.requires_grad]
    # peft keeps what it trains in float32; trl has it in bfloat16 over 4-bit weights
    each = 2 if quantized else trained[0].element_size()
    layers = next((m for m in model.modules() if isinstance(m, nn.ModuleList)), None)
    if layers is None or model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no list of decoder layers or no head: no plan is made for "
            "it"
        )
    named = (
        name.removesuffix(".base_layer")
        for name, m in layers[0].named_modules()
        if _is_frozen_linear(name, m)
    )
    if other := sorted({name.rpartition(".")[2] for name in named} - set(LINEARS)):
        raise ValueError(
            f"{config.model_type} has {', '.join(other)} in a layer: plans are made for Llama's "
            "kind"
        )
    compute = 4 if COMPUTE_DTYPE[PRECISIONS[precision]] == "float32" else 2
    head = model.get_output_embeddings().weight
    gathered = sum(
        size(p) if id(p) in linears else p.numel() * compute for p in layers[0].parameters()
    )
    matrices = [p for p in model.parameters() if p.ndim > 1]
    return Weights(
        base=sum(size(p) for p in model.parameters() if id(p) in base),
        adapter=each * sum(p.numel() for p in adapter),
        gradients=each * sum(p.numel() for p in trained),
        optimizer_state=optimizer_bytes(recipe.training.optim, [p.numel() for p in trained], each),
        layer=gathered,
        tail=head.numel() * compute,
        trained=sum(p.numel() for p in matrices if p.requires_grad),
        frozen=sum(p.numel() for p in matrices if not p.requires_grad),
        linears=sum(p.numel() for p in layers[0].parameters() if p.ndim > 1 and id(p) in base),
        head=head.numel(),
        flops=flops_per_token(model),
    )


def _is_frozen_linear(name: str, module: nn.Module) -> bool:
    return isinstance(module, LINEAR_LAYERS) and "lora_" not in name and "lm_head" not in name


def packed_bytes(count: int, nested: bool) -> int:
    """Bytes of `count` weights in 4 bits (QLoRA, Dettmers et al. 2023): blocks of 64 share a scale.

    `nested`: the scales themselves in 8 bits, 256 sharing one in float32.
    """
    scales = -(-count // 64)
    return count // 2 + (scales + 4 * -(-scales // 256) if nested else 4 * scales)


def optimizer_bytes(name: str, sizes: list[int], each: int) -> int:
    """Bytes of an optimizer's state on the GPU for trained tensors of `sizes` elements of `each`
    bytes.

    ValueError for an optimizer whose state is not known here.
    """
    if name == "sgd":
        return 0
    if name in ("adamw_torch", "adamw_torch_fused"):
        return sum(2 * each * size + 4 for size in sizes)  # two moments, and the step in float32
    small = [
        size
        for size in sizes
        if size < (100_000 if "paged" in name else 4096 if "8bit" in name else 0)
    ]
    per = 2 if "8bit" in name else 8
    if name in ("paged_adamw_32bit", "paged_adamw", "paged_adamw_8bit"):
        return 8 * sum(small)  # the rest is in memory that the driver pages, outside the allocator
    if name in ("adamw_bnb_8bit", "adamw_8bit"):
        return per * (sum(sizes) - sum(small)) + 8 * sum(small)
    raise ValueError(
        f"no plan for optim {str.__str__(name)}: known are adamw_torch, adamw_torch_fused, sgd and "
        "bitsandbytes' AdamW"
    )
