"""How much memory does a training step need at its peak? Worked out from shapes and dtypes.

No weights are loaded. Sizes are bytes of one rank. Activations are the tensors that autograd keeps
of a Llama decoder layer, or what was measured of a layer of another kind. Eager mode and inductor's
partitioner choose differently, and the tests count both.
The reference of preference tuning keeps no activations, and works on less than a backward does.
The peak can be at one of four moments:
- in the loss, which holds a chunk of logits beside all activations
- in the backward of the last layer, which holds its working tensors
- at the end of the backward without LoRA, when all gradients are there
- in the optimizer's step, which may need copies
"""

from collections.abc import Sequence
from typing import NamedTuple

from sftlab.data.collator import TOKENS_MULTIPLE
from sftlab.fastpath.float8_lora import columns_beside
from sftlab.fastpath.fused_loss import CHUNK
from sftlab.fastpath.lora_products import LARGEST_SHARED_RANK, padded
from sftlab.planning.step import Step, widths

# Tensors of the MLP's width that live at once in a layer's forward or backward beside those that
# are kept: (output projection of the MLP without LoRA, with LoRA). Counted on a CPU with the
# profiler's record of allocations.
WORK_COMPILED = (2.0, 4.0)
WORK_EAGER = (3.0, 2.0)
# peft casts the output projection's input to float32 and back in the forward, when the layer's kept
# tensors are there already
WORK_EAGER_CASTS = (3.0, 3.75)
# a forward that checkpointing repeats does not have its peak at its end (checkpointed cells of
# results/plan_accuracy/plan_accuracy.csv)
WORK_EAGER_AGAIN = (3.0, 2.75)
# eager float8 rounds through two float32 copies of the MLP's widest input
WORK_EAGER_FP8 = (5.0, 5.0)
# Outputs of the experts that a token visits, one for each, which live at once beside what is kept
# (counted on a CPU, uncompiled)
OUTPUTS_OF_EXPERTS = 3.0
# Linears of a layer that read the same tensor.
_READ_ONE_TENSOR = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj"),
    ("down_proj",),
)
# Units whose whole weights FSDP2 holds at once, the working one and the buffer that the next one
# arrives in. What was measured in units of a layer has one layer more.
FSDP_UNITS_IN_FLIGHT, FSDP_LAYERS_BESIDES = 2, 1
# cuBLAS's workspace, and all that is too small to count.
WORKSPACE = 8 * 2**20
# Share of the allocated memory that an allocator cannot use when memory is short (an estimate).
FRAGMENTATION = 0.04
# CUDA's context and NCCL's buffers, which the allocator does not see (an estimate).
CONTEXT = 0.6 * 2**30


class Memory(NamedTuple):
    """Bytes of a rank at the peak, by part; `at` names the moment."""

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
        """Memory between tensors that cannot be used when memory is short."""
        return int(FRAGMENTATION * self.allocated)

    @property
    def needed(self) -> int:
        """Memory that a GPU must have."""
        return int(self.allocated + self.fragmentation + CONTEXT)


def kept_bytes(step: Step) -> float:
    """Returns the bytes a token that one decoder layer keeps for its backward."""
    if step.measured:
        return step.measured.kept
    s, b, targets = step.shape, step.compute_bytes, step.targets
    query, key = s.heads * s.head_size, s.key_heads * s.head_size
    # with a padding mask, keys and values are repeated for every query head
    attention = b * 2 * (query + (key if step.packed else query)) + 4 * s.heads
    residual = max(b, step.weight_bytes)
    into_attention, into_mlp = _readers(step)
    normed = list(zip((into_attention, into_mlp), recomputed_norms(step), strict=True))
    adapters = len(targets) - 2 * ("qkv_proj" in step.fused) - ("gate_up_proj" in step.fused)
    separate = step.dropout or (step.casts and not step.compiled)
    inputs = s.hidden * sum(n if separate else min(n, 1) for n, again in normed if not again)
    inputs += query * ("o_proj" in targets and (step.casts or step.dropout))
    inputs += s.mlp * ("down_proj" in targets and not step.float8_mlp)
    masks = step.dropout * (s.hidden * (into_attention + into_mlp) + query * ("o_proj" in targets))
    masks += step.dropout * s.mlp * ("down_proj" in targets)
    lora = b * (inputs + step.rank * adapters) + masks
    as_one = has_fused_mlp(step)
    if step.fused_lora:
        lora = _kept_by_fused_lora(
            step,
            [
                *((s.hidden, n, not again) for n, again in normed),
                # with a padding mask, what attention keeps has its heads in another order
                (query, "o_proj" in targets, step.keeps_inputs or not step.packed),
                (0 if as_one else s.mlp, "down_proj" in targets, True),
            ],
        )
    lora += _routing_bytes(step)
    if step.compiled:
        scales = 0 if step.recomputes_norms else 2 * 4
        norms = 2 * residual * s.hidden + scales + b * s.norm_elements + 4 * s.norm_vectors
        return norms + attention + b * 2 * s.mlp + lora
    norms = 2 * (4 * s.hidden + 4) + 4 * (s.norm_elements + s.norm_vectors)
    return norms + attention + b * (2 if as_one else 3) * s.mlp + lora


def _readers(step: Step) -> tuple[int, int]:
    """Returns how many trained linears read the input of the attention, and that of the MLP."""
    attention, mlp = {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}
    return (
        1 if "qkv_proj" in step.fused else len(step.targets & attention),
        1 if "gate_up_proj" in step.fused else len(step.targets & mlp),
    )


def recomputed_norms(step: Step) -> tuple[bool, bool]:
    """Whether the backward computes the norms before attention and MLP again for their outputs.

    What peft drops or casts of an output is a tensor of its own, which is kept.
    """
    if not (step.recomputes_norms and step.shape.norms_first):
        return False, False
    copied = step.rank > 0 and not step.fused_lora and (step.dropout or step.casts)
    into_attention, into_mlp = _readers(step)
    return into_attention > 0 and not copied, into_mlp > 0 and (not copied or step.float8_mlp)


def has_fused_mlp(step: Step) -> bool:
    """Whether gate, up and down are one function, which keeps no activation for its gradient."""
    if not step.fused_lora or step.dropout or "gate_up_proj" in step.fused:
        return False
    all_three = step.targets >= {"gate_proj", "up_proj", "down_proj"}
    return all_three and padded(2 * step.rank) <= LARGEST_SHARED_RANK


def _columns(step: Step, ranks: int) -> int:
    """Returns the columns beside an input of linears that have so many ranks in all."""
    return columns_beside(ranks) if step.precision == "fp8" else padded(ranks)


def _fused_copies(step: Step) -> int:
    """Returns the bytes of A and B of fused LoRA, padded, beside the matrices that train.

    Those in float8, beside float8 weights, are a byte each. Weights in 4 bits are whole meanwhile:
    those of an MLP that is one function at the same time.
    """
    if not step.fused_lora:
        return 0
    s, ends, found = step.shape, widths(step), 0
    for names in _READ_ONE_TENSOR:
        mine = [ends[name] for name in names if name in step.targets]
        if mine:
            ranks = _columns(step, len(mine) * step.rank)
            found += ranks * (mine[0][0] + sum(out for _, out in mine) + ranks)
    whole = 3 * s.mlp * s.hidden if step.quantized and has_fused_mlp(step) else 0
    rounded = s.layers * found * (step.precision == "fp8")
    return step.compute_bytes * (s.layers * found + whole) + rounded


def _routing_bytes(step: Step) -> float:
    """Returns the bytes a token that a mixture's layer keeps beside the products within experts.

    That is the router's softmax, the chosen experts, their order three times, and each expert's
    output with its weight.
    """
    s, b = step.shape, step.compute_bytes
    return 4 * s.experts + s.taken * (4 * 8 + b * s.hidden + b)


def _kept_by_fused_lora(step: Step, inputs: Sequence[tuple[int, int, bool]]) -> float:
    """Returns the bytes a token of what LoRA adds: inputs, their ranks, and dropout's bits.

    `inputs` have the size of an input, how many linears with LoRA read it, and whether it is kept
    for them alone.
    """
    kept = 0.0
    for size, readers, own in inputs:
        together = readers == 1 or padded(readers * step.rank) <= LARGEST_SHARED_RANK
        products, rank = (1, readers * step.rank) if together else (readers, step.rank)
        copies = products if step.keeps_inputs else 1
        if readers:
            columns = products * _columns(step, rank)
            kept += step.compute_bytes * (own * copies * size + columns)
            kept += step.dropout * readers * size / 8
    return kept


def memory(step: Step) -> Memory:
    """Returns the peak of a training: in a step or, where it is higher, before the first one."""
    in_a_step = _in_a_step(step)
    moments = [in_a_step, *_after_the_backward(step, in_a_step)]
    if step.strategy == "fsdp" and step.quantized:
        # every GPU holds the whole 4-bit weights, and beside them the shards that are being made
        w = step.weights
        shards = w.base // step.processes
        moments.append(Memory(w.base, w.adapter, 0, 0, 0, 0, shards, WORKSPACE, "sharding"))
    return max(moments, key=lambda moment: moment.allocated)


def _in_a_step(step: Step) -> Memory:
    """Returns the memory of the loss or of the last layer's backward, whichever is more."""
    w, tokens = step.weights, step.tokens
    if step.packed:
        tokens = -(-tokens // TOKENS_MULTIPLE) * TOKENS_MULTIPLE
    logits, working = _logits(step, tokens), _working_bytes(step, tokens)
    in_loss = logits + communication_bytes(step, "loss")
    in_backward = working + communication_bytes(step, "backward")
    at = "loss" if in_loss >= in_backward else "backward"
    share = step.processes if step.strategy == "fsdp" else 1
    trained_share = 1 if step.rank else share  # every process keeps LoRA matrices whole
    # without LoRA, gradients come as activations go, unless an earlier micro-batch left some
    gradients = _gradients(step) if step.rank or step.accumulation > 1 else 0
    head = step.float8_head * step.shape.vocabulary * step.shape.hidden
    return Memory(
        parameters=w.base // share + head,
        adapter=w.adapter * (1 + step.reference_adapter) // trained_share + _fused_copies(step),
        gradients=gradients,
        optimizer_state=w.optimizer_state // trained_share,
        activations=_kept_at_end(step, tokens) + (int(working) if at == "backward" else 0),
        logits=logits if at == "loss" else 0,
        communication=communication_bytes(step, at),
        workspace=WORKSPACE,
        at=at,
    )


def _kept_at_end(step: Step, tokens: int) -> int:
    """Returns the bytes that are kept for the backward when the forward ends."""
    s, w, b = step.shape, step.weights, step.compute_bytes
    residual = max(b, step.weight_bytes)
    layers = s.layers * (residual * s.hidden if step.checkpointing else kept_bytes(step))
    norm = (b if step.compiled else 4) * s.hidden
    if step.measured:
        norm = step.measured.outside
    # autocast keeps rounded copies of weights for the backward; with checkpointing only a layer's
    casts = b * w.trained if step.casts else 0
    casts += b * w.frozen if step.weight_bytes > b else 0
    casts //= s.layers if step.checkpointing else 1
    return int(tokens * (layers + norm + b * s.hidden) + casts)


def _working_bytes(step: Step, tokens: int) -> float:
    """Returns the bytes that the backward of a layer works on."""
    s, b = step.shape, step.compute_bytes
    if found := step.measured:
        return tokens * (found.working + found.largest * step.checkpointing)
    again = kept_bytes(step) if step.checkpointing else 0
    width = working_width(step) * s.mlp
    if s.experts:
        width = max(OUTPUTS_OF_EXPERTS * s.taken * s.hidden, s.taken * s.hidden + 2 * s.mlp)
    return tokens * (b * width + b * s.hidden + again) + _float8_weight(step)


def _float8_weight(step: Step) -> int:
    """Returns the bytes of the largest weight in 4 bits while it is in float8."""
    if not step.quantized or step.precision != "fp8":
        return 0
    return max(into * out for into, out in widths(step).values())


def _logits(step: Step, tokens: int) -> int:
    s, b = step.shape, step.compute_bytes
    if step.whole_logits:
        return int(tokens * s.vocabulary * 4 * step.whole_logits)
    a_logit = b + step.float8_head
    return a_logit * min(tokens, CHUNK) * s.vocabulary + b * 2 * tokens * s.hidden


def _after_the_backward(step: Step, in_a_step: Memory) -> list[Memory]:
    """Returns the moments when all gradients are there, and no activations."""
    done = in_a_step._replace(gradients=_gradients(step), activations=0, logits=0)
    found = []
    if not step.rank:  # the embedding's comes last, beside the head's or what is there already
        copies = 2 if step.accumulation > 1 else 1
        embedding = step.shape.vocabulary * step.shape.hidden * step.weight_bytes * copies
        found.append(done._replace(gradients=done.gradients + embedding, at="gradients"))
    if step.optimizer_copies:
        found.append(done._replace(optimizer_state=done.optimizer_state * 3 // 2, at="optimizer"))
    return found


def _gradients(step: Step) -> int:
    # every process keeps the gradients of LoRA matrices whole
    sharded = step.strategy == "fsdp" and not step.rank
    return step.weights.gradients // (step.processes if sharded else 1)


def communication_bytes(step: Step, at: str) -> int:
    """Returns the bytes of gathered shards (FSDP2), or of DDP's buckets for gradients."""
    w = step.weights
    if step.strategy == "ddp":
        return w.gradients
    if step.strategy == "single":
        return 0
    in_flight = step.layers_per_unit
    if at != "loss":
        in_flight = FSDP_UNITS_IN_FLIGHT * step.layers_per_unit + FSDP_LAYERS_BESIDES
    if not step.reshard or in_flight > step.shape.layers:
        in_flight = step.shape.layers
    return w.tail + in_flight * w.layer


def working_width(step: Step) -> float:
    """Returns the tensors of the MLP's width that a layer works on beside those it keeps."""
    if step.compiled:
        found = WORK_COMPILED
    elif step.precision == "fp8":
        found = WORK_EAGER_FP8
    elif step.casts:
        found = WORK_EAGER_AGAIN if step.checkpointing else WORK_EAGER_CASTS
    else:
        found = WORK_EAGER
    return found["down_proj" in step.targets]
