"""Peak memory of a training step, worked out from shapes and dtypes before any weights are loaded.

Weights, gradients and optimizer state are counted exactly, on the meta device. Activations are the tensors that
autograd keeps of a decoder layer of Llama's kind, as eager mode or inductor's partitioner chooses them (counted in both
by the tests). Two moments can be the peak: the loss, which holds a chunk of logits beside all activations, and the
backward of the last layer, which holds what it works on. Sizes are bytes, those of one rank.
"""

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from trl import get_peft_config

from sftlab.config import Recipe
from sftlab.fastpath import FastPath
from sftlab.launch import COMPUTE_DTYPE, Launch
from sftlab.loss import CHUNK
from sftlab.measure import Flops, flops_per_token
from sftlab.packing import TOKENS_MULTIPLE

# Tensors as wide as the MLP that live at once in a layer's forward or backward beyond what is kept: (MLP's output
# projection not trained, trained). Counted on a CPU with the profiler's record of allocations.
WORK_COMPILED = (2.0, 4.0)
WORK_EAGER = (3.0, 2.0)
# peft casts the input of the output projection to float32 and back in the forward, all of the layer kept already
WORK_EAGER_CASTS = (3.0, 3.75)
# where that forward is repeated its end is not the peak (checkpointed cells of results/plan_accuracy.csv)
WORK_EAGER_AGAIN = (3.0, 2.75)
# eager float8 rounds by way of two float32 copies of the MLP's widest input
WORK_EAGER_FP8 = (5.0, 5.0)
# Layers whose weights FSDP2 holds whole at once: the one that works, the next one's, and the buffer it arrives in.
FSDP_LAYERS_IN_FLIGHT = 3
# cuBLAS's workspaces on Hopper, and what is too small to be counted.
WORKSPACE = 64 * 2**20
# What an allocator that is short of memory cannot use, as a share of what is allocated.
FRAGMENTATION = 0.04
# CUDA's context and NCCL's buffers, which the allocator does not see (nvidia-smi against torch.cuda.mem_get_info).
CONTEXT = 0.6 * 2**30


class Shape(NamedTuple):
    """A decoder: hidden and MLP width, layers, query and key heads and their size, words."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    words: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Shape":
        """ValueError for a model that is no dense decoder."""
        config = config.get_text_config()
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        if any(not isinstance(getattr(config, name, None), int) for name in names):
            raise ValueError(f"{config.model_type} has no single width of its MLP or heads: no plan is made for it")
        if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
            raise ValueError(f"{config.model_type} is a mixture of experts: no plan is made for it")
        hidden, mlp, layers, heads, words = (getattr(config, name) for name in names)
        size = getattr(config, "head_dim", None) or hidden // heads
        return cls(hidden, mlp, layers, heads, getattr(config, "num_key_value_heads", None) or heads, size, words)


class Weights(NamedTuple):
    """What a rank holds before any sharding, in bytes: the base model, adapter, gradients and optimizer state.

    `layer` and `tail` are what FSDP2 gathers as one: a decoder layer, and the head with the last norm. Elements of
    matrices: `trained` and `frozen` of the model, `linears` of one layer without its adapter, `head`.
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


@dataclass(frozen=True)
class Step:
    """What a micro-batch is made of, as far as memory and time depend on it."""

    shape: Shape
    weights: Weights
    precision: str
    targets: frozenset[str]
    rank: int
    tokens: int
    row_length: float
    strategy: str = "single"
    processes: int = 1
    quantized: bool = False
    weight_bytes: int = 2
    checkpointing: bool = False
    compiled: bool = True
    packed: bool = True
    dropout: bool = False
    whole_logits: float = 0.0  # float32 copies of all logits at once, where the loss is not taken in chunks

    @property
    def compute_bytes(self) -> int:
        """Of an activation's element."""
        return torch.finfo(getattr(torch, COMPUTE_DTYPE[self.precision])).bits // 8

    @property
    def casts(self) -> bool:
        """Whether LoRA's inputs are copies: its float32 matrices have peft cast to float32, autocast back."""
        return self.compute_bytes == 2 and not self.quantized and self.strategy != "fsdp"


class Memory(NamedTuple):
    """Bytes a rank at the peak, by part. `at` says which moment that is."""

    parameters: int
    adapter: int
    gradients: int
    optimizer_state: int
    activations: int
    logits: int
    communication: int
    workspace: int
    at: str

    @property
    def allocated(self) -> int:
        """The allocator's peak."""
        return sum(self[:-1])

    @property
    def fragmentation(self) -> int:
        """What cannot be used between tensors when memory is short."""
        return int(FRAGMENTATION * self.allocated)

    @property
    def needed(self) -> int:
        """Memory that a GPU must have."""
        return int(self.allocated + self.fragmentation + CONTEXT)


def kept(step: Step) -> float:
    """Bytes a token that one decoder layer keeps for its backward."""
    s, b, targets = step.shape, step.compute_bytes, step.targets
    query, key = s.heads * s.head_size, s.key_heads * s.head_size
    # a padding mask has keys and values repeated for every query head
    attention = b * 2 * (query + (key if step.packed else query)) + 4 * s.heads
    residual = max(b, step.weight_bytes)
    into_attention, into_mlp = len(targets & {"q_proj", "k_proj", "v_proj"}), len(targets & {"gate_proj", "up_proj"})
    separate = step.dropout or (step.casts and not step.compiled)
    inputs = s.hidden * sum(n if separate else min(n, 1) for n in (into_attention, into_mlp))
    inputs += query * ("o_proj" in targets and (step.casts or step.dropout)) + s.mlp * ("down_proj" in targets)
    masks = step.dropout * (s.hidden * (into_attention + into_mlp) + query * ("o_proj" in targets))
    masks += step.dropout * s.mlp * ("down_proj" in targets)
    lora = b * (inputs + step.rank * len(targets)) + masks
    if step.compiled:
        return 2 * (residual * s.hidden + 4) + attention + b * 2 * s.mlp + lora
    if step.precision == "fp8" and step.strategy == "fsdp":  # torchao's linears keep their inputs
        lora += b * (s.hidden * ((not into_attention) + (not into_mlp)) + s.mlp * ("down_proj" not in targets))
    return 2 * (4 * s.hidden + 4) + attention + b * 3 * s.mlp + lora


def memory(step: Step) -> Memory:
    """The peak of a step."""
    s, w, b = step.shape, step.weights, step.compute_bytes
    tokens = -(-step.tokens // TOKENS_MULTIPLE) * TOKENS_MULTIPLE if step.packed else step.tokens
    layer, residual = kept(step), max(b, step.weight_bytes)
    layers = s.layers * (residual * s.hidden if step.checkpointing else layer)
    norm = (b if step.compiled else 4) * s.hidden
    kept_at_end = tokens * (layers + norm + b * s.hidden)
    # frozen weights that autocast rounds are kept by autograd; the trained ones' copies too
    casts = b * w.trained if step.casts else 0
    casts += b * w.frozen if step.weight_bytes > b else 0
    working = tokens * (width(step) * b * s.mlp + b * s.hidden + (layer if step.checkpointing else 0))
    if step.whole_logits:
        logits = int(tokens * s.words * 4 * step.whole_logits)
    else:
        logits = b * (min(tokens, CHUNK) * s.words + 2 * tokens * s.hidden)
    sharded = step.strategy == "fsdp"
    in_flight = FSDP_LAYERS_IN_FLIGHT * w.layer if sharded else w.gradients if step.strategy == "ddp" else 0
    share = step.processes if sharded else 1
    at_loss, at_backward = logits + (0 if sharded else in_flight), int(working) + in_flight
    loss_is_peak = at_loss >= at_backward
    activations = int(kept_at_end + casts) + (0 if loss_is_peak else int(working))
    return Memory(
        w.base // share,
        w.adapter // share,
        w.gradients // share,
        w.optimizer_state // share,
        activations,
        logits if loss_is_peak else 0,
        (w.tail if sharded else 0) + (0 if loss_is_peak and sharded else in_flight),
        WORKSPACE,
        "loss" if loss_is_peak else "backward",
    )


def width(step: Step) -> float:
    """Tensors as wide as the MLP that a layer works on beyond what it keeps."""
    if step.compiled:
        found = WORK_COMPILED
    elif step.precision == "fp8":
        found = WORK_EAGER_FP8
    elif step.casts:
        found = WORK_EAGER_AGAIN if step.checkpointing else WORK_EAGER_CASTS
    else:
        found = WORK_EAGER
    return found["down_proj" in step.targets]


def weigh(recipe: Recipe, config: PreTrainedConfig, launch: Launch) -> Weights:
    """Count the weights of a recipe's model, its adapter, gradients and optimizer state on the meta device."""
    trust, config = recipe.training.trust_remote_code, copy.deepcopy(config)
    if hasattr(config, "quantization_config"):  # of a model that was loaded in 4 bits
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust, dtype=recipe.model.dtype)
        base = {id(p) for p in model.parameters()}
        peft_config = get_peft_config(recipe.model)
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
    quantized, precision = recipe.model.load_in_4bit, recipe.training.mixed_precision
    linears = {id(m.weight): m for n, m in model.named_modules() if _is_frozen_linear(n, m)}
    in_float8 = precision == "fp8" and launch.strategy != "fsdp"

    def size(parameter: nn.Parameter) -> int:
        if id(parameter) in linears and quantized:
            return packed_bytes(parameter.numel(), recipe.model.use_bnb_nested_quant)
        return parameter.numel() * (2 if id(parameter) in linears and in_float8 else parameter.element_size())

    adapter = [p for p in model.parameters() if id(p) not in base]
    trained = [p for p in model.parameters() if p.requires_grad]
    # peft keeps what it trains in float32; trl has it in bfloat16 over 4-bit weights
    each = 2 if quantized else trained[0].element_size()
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    compute = 4 if COMPUTE_DTYPE[launch.precision or "fp32"] == "float32" else 2
    head = model.get_output_embeddings().weight
    gathered = sum(size(p) if id(p) in linears else p.numel() * compute for p in layers[0].parameters())
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
    return isinstance(module, nn.Linear) and "lora_" not in name and "lm_head" not in name


def packed_bytes(count: int, nested: bool) -> int:
    """Bytes of `count` weights in 4 bits (QLoRA, Dettmers et al. 2023): blocks of 64 share a scale.

    `nested`: the scales themselves in 8 bits, 256 sharing one in float32.
    """
    scales = -(-count // 64)
    return count // 2 + (scales + 4 * -(-scales // 256) if nested else 4 * scales)


def optimizer_bytes(name: str, sizes: list[int], each: int) -> int:
    """Bytes of an optimizer's state on the GPU for trained tensors of `sizes` elements of `each` bytes.

    ValueError for an optimizer whose state is not known here.
    """
    if name == "sgd":
        return 0
    if name in ("adamw_torch", "adamw_torch_fused"):
        return sum(2 * each * size + 4 for size in sizes)  # two moments, and the step in float32
    small = [size for size in sizes if size < (100_000 if "paged" in name else 4096 if "8bit" in name else 0)]
    per = 2 if "8bit" in name else 8
    if name in ("paged_adamw_32bit", "paged_adamw", "paged_adamw_8bit"):
        return 8 * sum(small)  # the rest is in memory that the driver pages, outside the allocator
    if name in ("adamw_bnb_8bit", "adamw_8bit"):
        return per * (sum(sizes) - sum(small)) + 8 * sum(small)
    raise ValueError(f"no plan for optim {name}: known are adamw_torch, adamw_torch_fused, sgd and bitsandbytes' AdamW")


def step_of(
    recipe: Recipe, config: PreTrainedConfig, launch: Launch, fast: FastPath, tokens: int, row_length: float
) -> Step:
    """The step of a recipe under a launch config, `tokens` in a micro-batch of rows of `row_length` tokens."""
    model, training = recipe.model, recipe.training
    names = model.lora_target_modules or []
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    targets = linears if names == "all-linear" or not model.use_peft else names
    return Step(
        Shape.of(config),
        weigh(recipe, config, launch),
        launch.precision or "fp32",
        frozenset(name.rpartition(".")[2] for name in ([targets] if isinstance(targets, str) else targets)),
        model.lora_r if model.use_peft else 0,
        tokens,
        row_length,
        launch.strategy,
        launch.world_size,
        bool(model.load_in_4bit),
        torch.finfo(getattr(torch, model.dtype)).bits // 8,
        bool(training.gradient_checkpointing),
        fast.compile_layers,
        fast.packing,
        model.lora_dropout > 0 and model.use_peft,
    )
