"""Peak memory of a training step, worked out from shapes and dtypes before any weights are loaded.

Activations are the tensors that autograd keeps of a decoder layer of Llama's kind, as eager mode or
inductor's partitioner chooses them (counted in both by the tests). What can be the peak: the loss,
which holds a chunk of logits beside all activations; the backward of the last layer, which holds
what it works on; of a whole training the end of the backward, when all gradients are there; and the
optimizer's step, which may need copies. Sizes are bytes, of one rank.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from sftlab.config.launch import COMPUTE_DTYPE, PRECISIONS, Launch
from sftlab.config.recipe import Recipe
from sftlab.config.validation import of_bitsandbytes
from sftlab.data.collator import TOKENS_MULTIPLE
from sftlab.fastpath.fused_loss import CHUNK
from sftlab.fastpath.selection import FastPath
from sftlab.planning.weight_memory import LINEARS, Weights, weigh

# Tensors as wide as the MLP that live at once in a layer's forward or backward beyond what is kept:
# (MLP's output projection not trained, trained). Counted on a CPU with the profiler's record of
# allocations.
WORK_COMPILED = (2.0, 4.0)
WORK_EAGER = (3.0, 2.0)
# peft casts the input of the output projection to float32 and back in the forward, all of the layer
# kept already
WORK_EAGER_CASTS = (3.0, 3.75)
# where that forward is repeated its end is not the peak (checkpointed cells of
# results/plan_accuracy/plan_accuracy.csv)
WORK_EAGER_AGAIN = (3.0, 2.75)
# eager float8 rounds by way of two float32 copies of the MLP's widest input
WORK_EAGER_FP8 = (5.0, 5.0)
# Layers whose weights FSDP2 holds whole at once: the one that works, the next one's, and the buffer
# it arrives in.
FSDP_LAYERS_IN_FLIGHT = 3
# cuBLAS's workspace, and what is too small to be counted.
WORKSPACE = 8 * 2**20
# What an allocator that is short of memory cannot use, as a share of what is allocated (an
# estimate).
FRAGMENTATION = 0.04
# CUDA's context and NCCL's buffers, which the allocator does not see (an estimate).
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
        names = (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
        )
        if any(not isinstance(getattr(config, name, None), int) for name in names):
            raise ValueError(
                f"{config.model_type} has no single width of its MLP or heads: no plan is made for "
                "it"
            )
        if any(
            getattr(config, name, None)
            for name in ("num_experts", "num_local_experts", "n_routed_experts")
        ):
            raise ValueError(f"{config.model_type} is a mixture of experts: no plan is made for it")
        hidden, mlp, layers, heads, words = (getattr(config, name) for name in names)
        size = getattr(config, "head_dim", None) or hidden // heads
        return cls(
            hidden,
            mlp,
            layers,
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            size,
            words,
        )


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
    reshard: bool = True
    accumulation: int = 1
    optimizer_copies: bool = (
        False  # torch's AdamW, unless fused, takes the roots of all second moments at once
    )
    optimizer_waits: bool = False  # bitsandbytes' wait for the GPU after every trained tensor
    whole_logits: float = (
        0.0  # float32 copies of all logits at once, where the loss is not taken in chunks
    )

    @property
    def compute_bytes(self) -> int:
        """Of an activation's element."""
        return torch.finfo(getattr(torch, COMPUTE_DTYPE[self.precision])).bits // 8

    @property
    def casts(self) -> bool:
        """Whether LoRA's inputs are copies:

        its float32 matrices have peft cast to float32, autocast back.
        """
        return self.compute_bytes == 2 and not self.quantized


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
    into_attention, into_mlp = (
        len(targets & {"q_proj", "k_proj", "v_proj"}),
        len(targets & {"gate_proj", "up_proj"}),
    )
    separate = step.dropout or (step.casts and not step.compiled)
    inputs = s.hidden * sum(n if separate else min(n, 1) for n in (into_attention, into_mlp))
    inputs += query * ("o_proj" in targets and (step.casts or step.dropout)) + s.mlp * (
        "down_proj" in targets
    )
    masks = step.dropout * (s.hidden * (into_attention + into_mlp) + query * ("o_proj" in targets))
    masks += step.dropout * s.mlp * ("down_proj" in targets)
    lora = b * (inputs + step.rank * len(targets)) + masks
    if step.compiled:
        return 2 * (residual * s.hidden + 4) + attention + b * 2 * s.mlp + lora
    return 2 * (4 * s.hidden + 4) + attention + b * 3 * s.mlp + lora


def memory(step: Step) -> Memory:
    """The peak of a training: of a step or, where it is higher, of what comes before."""
    moments = [_in_a_step(step)]
    if step.strategy == "fsdp" and step.quantized:
        # 4-bit weights are whole on every GPU until the shards are made, which are held beside them
        # meanwhile
        w = step.weights
        moments.append(
            Memory(w.base, w.adapter, 0, 0, 0, 0, w.base // step.processes, WORKSPACE, "sharding")
        )
    moments += _after_the_backward(step, moments[0])
    return max(moments, key=lambda moment: moment.allocated)


def _in_a_step(step: Step) -> Memory:
    s, w, b = step.shape, step.weights, step.compute_bytes
    tokens = -(-step.tokens // TOKENS_MULTIPLE) * TOKENS_MULTIPLE if step.packed else step.tokens
    layer, residual = kept(step), max(b, step.weight_bytes)
    layers = s.layers * (residual * s.hidden if step.checkpointing else layer)
    norm = (b if step.compiled else 4) * s.hidden
    kept_at_end = tokens * (layers + norm + b * s.hidden)
    # weights that autocast rounds: copies that are kept for the backward, with checkpointing a
    # layer's
    casts = b * w.trained if step.casts else 0
    casts += b * w.frozen if step.weight_bytes > b else 0
    casts //= s.layers if step.checkpointing else 1
    working = tokens * (
        width(step) * b * s.mlp + b * s.hidden + (layer if step.checkpointing else 0)
    )
    if step.whole_logits:
        logits = int(tokens * s.words * 4 * step.whole_logits)
    else:
        logits = b * (min(tokens, CHUNK) * s.words + 2 * tokens * s.hidden)
    loss_is_peak = logits + sent(step, "loss") >= working + sent(step, "backward")
    at = "loss" if loss_is_peak else "backward"
    share = step.processes if step.strategy == "fsdp" else 1
    # of a whole training they come as the activations go, unless an earlier micro-batch left some
    gradients = _gradients(step) if step.rank or step.accumulation > 1 else 0
    activations = int(kept_at_end + casts) + (0 if loss_is_peak else int(working))
    trained_share = 1 if step.rank else share  # every process keeps LoRA matrices whole
    return Memory(
        w.base // share,
        w.adapter // trained_share,
        gradients,
        w.optimizer_state // trained_share,
        activations,
        logits if loss_is_peak else 0,
        sent(step, at),
        WORKSPACE,
        at,
    )


def _after_the_backward(step: Step, loss: Memory) -> list[Memory]:
    """All gradients are there, and no activations."""
    done = loss._replace(gradients=_gradients(step), activations=0, logits=0)
    found = []
    if not step.rank:  # the embedding's comes last, beside the head's or what is there already
        embedding = (
            step.shape.words * step.shape.hidden * step.weight_bytes * (1 + (step.accumulation > 1))
        )
        found.append(done._replace(gradients=done.gradients + embedding, at="gradients"))
    if step.optimizer_copies:
        found.append(done._replace(optimizer_state=done.optimizer_state * 3 // 2, at="optimizer"))
    return found


def _gradients(step: Step) -> int:
    # every process keeps the gradients of LoRA matrices whole
    return step.weights.gradients // (
        step.processes if step.strategy == "fsdp" and not step.rank else 1
    )


def sent(step: Step, at: str) -> int:
    """Bytes of other processes' shards (FSDP2), or of the buckets that gradients are averaged in
    (DDP).
    """
    w = step.weights
    if step.strategy == "ddp":
        return w.gradients
    if step.strategy == "single":
        return 0
    in_flight = (
        step.shape.layers if not step.reshard else 1 if at == "loss" else FSDP_LAYERS_IN_FLIGHT
    )
    return w.tail + in_flight * w.layer


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


def step_of(
    recipe: Recipe,
    config: PreTrainedConfig,
    launch: Launch,
    fast: FastPath,
    tokens: int,
    row_length: float,
) -> Step:
    """The step of a recipe under a launch config, `tokens` in a micro-batch of rows of `row_length`
    tokens.
    """
    model, training = recipe.model, recipe.training
    names = model.lora_target_modules or []
    targets = LINEARS if names == "all-linear" or not model.use_peft else names
    targets = frozenset(
        name.rpartition(".")[2] for name in ([targets] if isinstance(targets, str) else targets)
    )
    if training.fused_loss is False:
        raise ValueError(
            "fused_loss: false keeps whole logits: plans are made for the fused loss alone"
        )
    if unknown := sorted(targets - set(LINEARS)):
        raise ValueError(f"LoRA on {', '.join(unknown)}: plans are made for {', '.join(LINEARS)}")
    return Step(
        Shape.of(config),
        weigh(recipe, config),
        PRECISIONS[training.mixed_precision],
        targets,
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
        launch.settings.get("FSDP_RESHARD_AFTER_FORWARD", "true") == "true",
        training.gradient_accumulation_steps,
        training.optim == "adamw_torch",
        of_bitsandbytes(training.optim),
    )
