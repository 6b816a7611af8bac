"""How long a training step takes, worked out from its arithmetic and its memory traffic on a GPU's
published rates.

The GPU's time is the sum of what its kernels need; the host's is what launching them takes, and the
longer of the two counts. What a kernel reaches of a rate, and the host's times, were taken from
profiles on one H200 (results/throughput/profile.csv and the fitted cells of
results/plan_accuracy/plan_accuracy.csv); on other GPUs they are extrapolated, and on other hosts go by a small
operation's time.
"""

from dataclasses import replace
from typing import NamedTuple

from sftlab.planning.gpu_specs import GPU, HOST_US
from sftlab.planning.step_memory import Step, kept

# Of the published matrix rate: what a large product reaches, and of that what a decoder's products
# do on average.
MATRIX = 0.80 * 0.85
# Of 16 bits' matrix rate, the attention kernels in float32: each product is three of TF32, at half
# that rate.
ATTENTION_FP32 = 0.14 / 6
# What float32 products reach of its rate, the decoder's on average (results/float32/profile.csv).
MATRIX_FP32 = 0.75
# Attention's share of the matrix rate on rows of a few hundred tokens; it grows with their length
# up to the second.
ATTENTION = (0.14, 0.30)
# Of the published memory rate, what the kernels between a layer's products reach.
MEMORY = 0.68
# Bytes that these move, forward and backward, for each byte that the layer keeps without LoRA.
# tests/test_pace.py counts them, and the next two lines'.
TRAFFIC_COMPILED, TRAFFIC_EAGER, TRAFFIC_EAGER_FP32 = 5.0, 13.7, 10.9
# Elements for each that goes into or comes out of a linear with LoRA; float32 matrices have them
# cast and cast back.
LORA_COMPILED, LORA_EAGER, LORA_CASTS = 5.5, 8.0, 14.0
# The forward's share of both, which checkpointing moves again.
FORWARD, FORWARD_LORA = 0.32, 0.45
# Bytes for each element that goes into or comes out of a float8 product: its largest value,
# rounding, reading back. Uncompiled, every operation of `to_float8` reads and writes anew: 2 + 2,
# 2, 2 + 4, 4 + 4, 4 + 4, 4 + 1. What goes in is rounded forward, the gradient of what comes out
# backward.
TRAFFIC_FP8_COMPILED, TRAFFIC_FP8_EAGER, FORWARD_FP8 = 7.0, 33.0, 0.5
# Times that dequantising takes over reading 4 and writing 16 bits a weight.
DEQUANTISING = 2.4
# Seconds of the host for a decoder layer, forward and backward, and for each module with LoRA in
# it; and what a layer takes besides: float8 (eager, compiled), 4-bit weights, FSDP2's hooks (of one
# process, of several).
HOST_COMPILED, HOST_EAGER = (2.7e-3, 0.36e-3), (4.4e-3, 0.86e-3)
HOST_FP8, HOST_QUANTIZED, HOST_FSDP = (7.0e-3, 2.4e-3), 3.25e-3, (1.0e-3, 3.6e-3)
# Times as long with checkpointing: the forward again, through hooks that pack and unpack every
# tensor.
HOST_CHECKPOINTED, HOST_AGAIN = 1.6, 1.2
# Seconds of a step in which the GPU waits until float16's loss scale is known to have overflowed or
# not.
HOST_SCALER = 0.010
# Seconds of a step for each trained tensor where the optimizer waits for the GPU after it, which is
# idle else.
HOST_TENSOR = 0.12e-3
# Seconds of the host beside the layers: for a micro-batch (its rows, embedding, loss), for a step
# (optimizer, logs).
HOST_MICRO, HOST_STEP = 0.005, 0.007
# Of a link's published rate, what a collective reaches.
LINK = 0.7


class Pace(NamedTuple):
    """Seconds of one micro-batch and its share of the step's:

    the GPU's by part, the host's, those of waiting.
    """

    matrices: float
    attention: float
    memory_traffic: float
    loss: float
    dequantising: float
    communication: float
    host: float
    waiting: float

    @property
    def gpu(self) -> float:
        """Seconds that the GPU works."""
        return sum(self[:5]) + max(0.0, self.communication - 0.5 * self.matrices)

    @property
    def seconds(self) -> float:
        """The GPU's or the host's time, whichever is longer.

        Where they are near each other, neither hides wholly.
        """
        return (self.gpu**8 + self.host**8) ** 0.125 + self.waiting

    @property
    def bound(self) -> str:
        """What the step waits for."""
        return "GPU" if self.gpu >= self.host else "host"


def pace(step: Step, gpu: GPU) -> Pace:
    """Seconds of a micro-batch on a GPU."""
    s, w, tokens, b = step.shape, step.weights, step.tokens, step.compute_bytes
    rate, half = gpu.tflops(step.precision) * 1e12, gpu.tflops("fp32" if b == 4 else "bf16") * 1e12
    reached = MATRIX_FP32 if b == 4 else MATRIX
    bandwidth, slower = gpu.memory_gbs * 1e9, gpu.host_us / HOST_US
    layer_weights = w.linears * s.layers
    # of a product: forward, its input's gradient, its weight's where that is trained, and the
    # forward again
    passes = 2.0 * (2 + (w.trained >= layer_weights) + step.checkpointing)
    matrices = tokens * passes * layer_weights / (rate * reached) + tokens * 4.0 * w.head / (
        half * reached
    )
    attended = (
        (3.5 + step.checkpointing) * 2 * tokens * step.row_length * s.heads * s.head_size * s.layers
    )
    attending = half * min(ATTENTION[1], ATTENTION[0] * max(1.0, step.row_length / 512) ** 0.5)
    if b == 4 and step.packed:
        attending = gpu.tflops("bf16") * 1e12 * ATTENTION_FP32
    unpacked = (
        2.5 * layer_weights * (3 if step.checkpointing else 2) * DEQUANTISING
        if step.quantized
        else 0.0
    )
    shards = (step.processes - 1) / step.processes
    sent = 2 * w.gradients * shards if step.strategy == "ddp" else 0.0
    if step.strategy == "fsdp":
        sent = ((3 if step.checkpointing else 2) * w.layer * s.layers + w.tail) * shards
    return Pace(
        matrices,
        attended / attending,
        tokens * s.layers * traffic(step) / (bandwidth * MEMORY),
        3 * b * tokens * s.words / bandwidth / 0.6,
        unpacked / bandwidth,
        sent / (gpu.link_gbs * 1e9 * LINK),
        host(step) * slower,
        (HOST_SCALER * (step.precision == "fp16") + updating(step) * slower) / step.accumulation,
    )


def traffic(step: Step) -> float:
    """Bytes a token that the kernels between a decoder layer's products move, forward and backward."""
    b, again, ends = step.compute_bytes, step.checkpointing, widths(step)
    with_lora = [ends[name] for name in step.targets if step.rank]
    uncompiled = TRAFFIC_EAGER_FP32 if b == 4 else TRAFFIC_EAGER
    bare = replace(step, targets=frozenset(), dropout=False)
    moved = kept(bare) * (TRAFFIC_COMPILED if step.compiled else uncompiled) * (1 + FORWARD * again)
    elements = LORA_COMPILED if step.compiled else LORA_CASTS if step.casts else LORA_EAGER
    moved += b * elements * sum(a + z for a, z in with_lora) * (1 + FORWARD_LORA * again)
    # an element read and written, and a byte of mask; backward the same
    moved += step.dropout * (2 * b + 1) * sum(a for a, _ in with_lora) * (2 + again)
    if step.precision == "fp8":
        rounding = TRAFFIC_FP8_COMPILED if step.compiled else TRAFFIC_FP8_EAGER
        moved += rounding * sum(a + z for a, z in ends.values()) * (1 + FORWARD_FP8 * again)
    return moved


def updating(step: Step) -> float:
    """Seconds of a step in which trained tensors are updated one after the other and the GPU waits."""
    of_a_layer = 2 * len(step.targets) if step.rank else len(widths(step)) + 2
    return HOST_TENSOR * step.optimizer_waits * of_a_layer * step.shape.layers


def host(step: Step) -> float:
    """Seconds that launching the kernels of a micro-batch takes on the host which the constants are
    from.
    """
    layer, lora = HOST_COMPILED if step.compiled else HOST_EAGER
    own = layer + lora * len(step.targets) * (step.rank > 0)
    besides = HOST_FP8[step.compiled] * (step.precision == "fp8") + HOST_QUANTIZED * step.quantized
    besides += HOST_FSDP[step.processes > 1] * (step.strategy == "fsdp")
    if step.checkpointing:
        own, besides = own * HOST_CHECKPOINTED, besides * HOST_AGAIN
    return step.shape.layers * (own + besides) + HOST_MICRO + HOST_STEP / step.accumulation


def widths(step: Step) -> dict[str, tuple[int, int]]:
    """Width of the input and the output of each linear of a layer."""
    s = step.shape
    query, key = s.heads * s.head_size, s.key_heads * s.head_size
    return {
        "q_proj": (s.hidden, query),
        "k_proj": (s.hidden, key),
        "v_proj": (s.hidden, key),
        "o_proj": (query, s.hidden),
        "gate_proj": (s.hidden, s.mlp),
        "up_proj": (s.hidden, s.mlp),
        "down_proj": (s.mlp, s.hidden),
    }
