"""How long a training step takes, worked out from its arithmetic and its memory traffic on a GPU's published rates.

The GPU's time is the sum of what its kernels need; the host's is what launching them takes, and the longer of the two
counts. Constants were taken from profiles on one H200 (results/throughput_profile.csv and the fitted cells of
results/plan_accuracy.csv); on other GPUs they are extrapolated, and on other hosts go by a small operation's time.
"""

from typing import NamedTuple

from sftlab.gpus import GPU, HOST_US
from sftlab.planner import Step, kept

# Of the published matrix rate: what a large product reaches, and of that what a decoder's products do on average.
MATRIX = 0.80 * 0.85
# Of float32's rate, the attention kernels, whose products have no tensor cores, by head size; large heads spill.
ATTENTION_FP32 = {64: 0.10, 128: 0.0045}
# float32 products of the same sizes
MATRIX_FP32 = 0.76 * 0.85
# Attention's share of the matrix rate on rows of a few hundred tokens; it grows with their length up to the second.
ATTENTION = (0.14, 0.30)
# Bytes moved for each byte that a layer keeps: norms, activations, casts and sums, forward and backward.
TRAFFIC_COMPILED, TRAFFIC_EAGER, TRAFFIC_EAGER_FP32 = 6.7, 22.0, 10.0
# Bytes for each element that goes into or comes out of a float8 product: its largest value, rounding, reading back.
# Uncompiled, every operation of `to_float8` reads and writes anew: 2 + 2, 2, 2 + 4, 4 + 4, 4 + 4, 4 + 1.
TRAFFIC_FP8_COMPILED, TRAFFIC_FP8_EAGER = 7.0, 33.0
# Bytes for each element beside a LoRA matrix: read and written three times at 16 bits, forward and backward.
TRAFFIC_LORA = 4
# Times that dequantising takes over reading 4 and writing 16 bits a weight.
DEQUANTISING = 2.4
# Seconds of the host for a decoder layer, forward and backward, and for each module with LoRA in it; and what a layer
# takes besides: float8 (eager, compiled), 4-bit weights, FSDP2's hooks (of one process, of several).
HOST_COMPILED, HOST_EAGER = (2.7e-3, 0.36e-3), (4.4e-3, 0.86e-3)
HOST_FP8, HOST_QUANTIZED, HOST_FSDP = (7.0e-3, 2.4e-3), 5.0e-3, (1.0e-3, 3.6e-3)
# Times as long with checkpointing: the forward again, through hooks that pack and unpack every tensor.
HOST_CHECKPOINTED, HOST_AGAIN = 1.6, 1.2
# Seconds of a step in which the GPU waits until float16's loss scale is known to have overflowed or not.
HOST_SCALER = 0.010
# Seconds of the host beside the layers: for a micro-batch (its rows, embedding, loss), for a step (optimizer, logs).
HOST_MICRO, HOST_STEP = 0.005, 0.007
# Of a link's published rate, what a collective reaches.
LINK = 0.7


class Pace(NamedTuple):
    """Seconds of one micro-batch and its share of the step's: the GPU's by part, the host's, those of waiting."""

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
        """The GPU's or the host's time, whichever is longer; where they are near each other, neither hides wholly."""
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
    bandwidth = gpu.memory_gbs * 1e9
    layer_weights = w.linears * s.layers
    # of a product: forward, its input's gradient, its weight's where that is trained, and the forward again
    passes = 2.0 * (2 + (w.trained >= layer_weights) + step.checkpointing)
    matrices = tokens * passes * layer_weights / (rate * reached) + tokens * 4.0 * w.head / (half * reached)
    attended = (3.5 + step.checkpointing) * 2 * tokens * step.row_length * s.heads * s.head_size * s.layers
    share = min(ATTENTION[1], ATTENTION[0] * max(1.0, step.row_length / 512) ** 0.5)
    if b == 4 and step.packed:
        share = ATTENTION_FP32[64 if s.head_size <= 64 else 128]
    traffic = TRAFFIC_COMPILED if step.compiled else TRAFFIC_EAGER_FP32 if b == 4 else TRAFFIC_EAGER
    moved = tokens * kept(step) * s.layers * traffic * (1.35 if step.checkpointing else 1.0)
    ends = widths(step)
    if step.precision == "fp8":
        rounding = TRAFFIC_FP8_COMPILED if step.compiled else TRAFFIC_FP8_EAGER
        moved += rounding * tokens * s.layers * sum(a + z for a, z in ends.values())
    trained = sum(a + z for name, (a, z) in ends.items() if name in step.targets) if step.rank else 0
    moved += TRAFFIC_LORA * b * tokens * s.layers * trained
    unpacked = 2.5 * layer_weights * (3 if step.checkpointing else 2) * DEQUANTISING if step.quantized else 0.0
    shards = (step.processes - 1) / step.processes
    sent = 2 * w.gradients * shards if step.strategy == "ddp" else 0.0
    if step.strategy == "fsdp":
        sent = ((3 if step.checkpointing else 2) * w.layer * s.layers + w.tail) * shards
    return Pace(
        matrices,
        attended / (half * share),
        moved / bandwidth,
        3 * b * tokens * s.words / bandwidth / 0.6,
        unpacked / bandwidth,
        sent / (gpu.link_gbs * 1e9 * LINK),
        host(step) * gpu.host_us / HOST_US,
        HOST_SCALER * (step.precision == "fp16"),
    )


def host(step: Step) -> float:
    """Seconds that launching the kernels of a micro-batch takes on the host which the constants are from."""
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
