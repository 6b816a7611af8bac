"""How many bytes do weights, gradients and optimizer state take? Counted on the meta device.

The count is exact, and nothing is loaded.
"""

import copy
from typing import NamedTuple

import torch
from peft import get_peft_model
from peft.tuners.lora import ParamWrapper
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from sftlab.config.launch import COMPUTE_DTYPE, PRECISIONS
from sftlab.config.recipe import Recipe
from sftlab.measurement.flops import NOT_MULTIPLIED, Flops, flops_per_token
from sftlab.models.loading import LINEAR_LAYERS
from sftlab.models.lora_config import lora_config
from sftlab.models.mixture import counts_of

# The linears of a Llama decoder layer.
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Linears that some families compute as one; their widths are the sums.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Weights(NamedTuple):
    """What a rank holds before any sharding.

    Bytes are `base`, `adapter`, `gradients` and `optimizer_state`, and the two units that FSDP2
    gathers: `layer`, a decoder layer, and `tail`, the head with the last norm. Elements of matrices
    are `trained` and `frozen` of the model, `linears` of one layer without its adapter, and `head`.
    Of a mixture, `linears` has the experts that a token visits.
    `fused` are a layer's linears that are several of Llama's in one, and `other` those that Llama
    does not have. Where layers are not alike, `layer` is the largest and `linears` the mean.
    `on_parameters` is whether LoRA is on the weights of experts or of their router.
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
    fused: frozenset[str] = frozenset()
    other: frozenset[str] = frozenset()
    on_parameters: bool = False


def count_weights(recipe: Recipe, config: PreTrainedConfig) -> Weights:
    """Returns the weights of a recipe's model with its adapter, gradients and optimizer state.

    Raises ValueError for a model without a list of decoder layers, weights in 8 bits, or an
    optimizer whose state is unknown.
    """
    if recipe.model.load_in_8bit:
        raise ValueError(
            "no plan is made for weights in 8 bits: pass --load_in_4bit=true or leave load_in_8bit "
            "out"
        )
    model, base = on_meta(recipe, config)
    layers = _layers(model)
    quantized, precision = recipe.model.load_in_4bit, recipe.training.mixed_precision
    linears = {id(m.weight) for n, m in model.named_modules() if _is_frozen_linear(n, m)}

    def size(parameter: nn.Parameter) -> int:
        if id(parameter) in linears and quantized:
            return packed_bytes(parameter.numel(), recipe.model.use_bnb_nested_quant)
        rounded = id(parameter) in linears and precision == "fp8"
        return parameter.numel() * (2 if rounded else parameter.element_size())

    def gathered(layer: nn.Module) -> int:
        return sum(size(p) if id(p) in linears else p.numel() * compute for p in layer.parameters())

    trained = [p for p in model.parameters() if p.requires_grad]
    # peft keeps trained weights in float32; over 4-bit weights trl makes them bfloat16
    each = 2 if quantized else trained[0].element_size()
    compute = 4 if COMPUTE_DTYPE[PRECISIONS[precision]] == "float32" else 2
    head = model.get_output_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim > 1]
    return Weights(
        base=sum(size(p) for p in model.parameters() if id(p) in base),
        adapter=each * sum(p.numel() for p in model.parameters() if id(p) not in base),
        gradients=each * sum(p.numel() for p in trained),
        optimizer_state=optimizer_bytes(recipe.training.optim, [p.numel() for p in trained], each),
        layer=max(map(gathered, layers)),
        tail=head.numel() * compute,
        trained=sum(p.numel() for p in matrices if p.requires_grad),
        frozen=sum(p.numel() for p in matrices if not p.requires_grad),
        linears=sum(_multiplied(layer, base, config) for layer in layers) // len(layers),
        head=head.numel(),
        flops=flops_per_token(model),
        fused=_linears(layers) & set(FUSED),
        other=_unlike_llamas(_linears(layers)),
        on_parameters=any(isinstance(one, ParamWrapper) for one in model.modules()),
    )


def on_meta(
    recipe: Recipe, config: PreTrainedConfig, attention: str | None = None
) -> tuple[nn.Module, set[int]]:
    """Returns the model with its adapter on the meta device, and the ids of base parameters."""
    model = build_on_meta(recipe, config, recipe.model.dtype, attention)
    base = {id(p) for p in model.parameters()}
    peft_config = lora_config(recipe.model)
    if peft_config is not None:
        peft_config.init_lora_weights = True  # the meta device has no weights to begin with
        with torch.device("meta"):
            model = get_peft_model(model, peft_config)
    return model, base


def build_on_meta(
    recipe: Recipe,
    config: PreTrainedConfig,
    dtype: str | torch.dtype,
    attention: str | None,
) -> PreTrainedModel:
    """Returns the base model without numbers; `attention` None is transformers' choice."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):  # of a model that was loaded in 4 bits
        del config.quantization_config
    given = {"attn_implementation": attention} if attention else {}
    trust = recipe.training.trust_remote_code
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust, dtype=dtype, **given
        )


def _layers(model: nn.Module) -> nn.ModuleList:
    """Returns the decoder layers; ValueError where there is no list of them, or no head."""
    layers = next((m for m in model.modules() if isinstance(m, nn.ModuleList)), None)
    if not layers or model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no list of decoder layers or no head: no plan is made for "
            "it"
        )
    return layers


def _multiplied(layer: nn.Module, base: set[int], config: PreTrainedConfig) -> int:
    """Returns the weights of a layer that a token is multiplied with, without its adapter."""
    experts, taken = counts_of(config.get_text_config()) or (1, 1)
    return sum(
        one.numel() * taken // experts if ".experts." in f".{name}" else one.numel()
        for name, one in layer.named_parameters()
        if one.ndim > 1 and id(one) in base and not name.endswith(NOT_MULTIPLIED)
    )


def _linears(layer: nn.Module) -> frozenset[str]:
    """Returns the last words of the names of a layer's linears, without its adapter's."""
    names = (name for name, m in layer.named_modules() if _is_frozen_linear(name, m))
    return frozenset(name.removesuffix(".base_layer").rpartition(".")[2] for name in names)


def _unlike_llamas(linears: frozenset[str]) -> frozenset[str]:
    """Returns the linears that Llama does not have; all of an MLP without a gate."""
    if "up_proj" in linears and "gate_proj" not in linears:
        return linears
    return linears - {*LINEARS, *FUSED}


def _is_frozen_linear(name: str, module: nn.Module) -> bool:
    return isinstance(module, LINEAR_LAYERS) and "lora_" not in name and "lm_head" not in name


def packed_bytes(count: int, nested: bool) -> int:
    """Returns the bytes of `count` weights in 4 bits (QLoRA, Dettmers et al. 2023).

    Blocks of 64 weights share a float32 scale. `nested` has the scales in 8 bits, and 256 of them
    share one in float32.
    """
    scales = -(-count // 64)
    return count // 2 + (scales + 4 * -(-scales // 256) if nested else 4 * scales)


def optimizer_bytes(name: str, sizes: list[int], each: int) -> int:
    """Returns the bytes of an optimizer's state on the GPU.

    Trained tensors have `sizes` elements of `each` bytes. Raises ValueError for an optimizer whose
    state is unknown.
    """
    if name == "sgd":
        return 0
    if name in ("adamw_torch", "adamw_torch_fused"):
        return sum(2 * each * size + 4 for size in sizes)  # two moments, and the step in float32
    # bitsandbytes keeps the moments of small tensors in float32, and does not page them
    if name in ("paged_adamw_32bit", "paged_adamw", "paged_adamw_8bit"):
        return 8 * sum(size for size in sizes if size < 100_000)  # the driver pages the rest
    if name in ("adamw_bnb_8bit", "adamw_8bit"):
        return sum((8 if size < 4096 else 2) * size for size in sizes)
    raise ValueError(
        f"no plan for optim {str.__str__(name)}: known are adamw_torch, adamw_torch_fused, sgd and "
        "bitsandbytes' AdamW"
    )
