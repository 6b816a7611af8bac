"""How long does a training step take? Worked out from its FLOPs and its memory traffic.

The GPU's time is the sum over its kernels at published rates. The host's time is what launching the
kernels takes. The longer of the two counts. Two things were measured on one H200
(results/throughput/profile.csv and the fitted cells of results/plan_accuracy/plan_accuracy.csv):
what share of a rate a kernel reaches, and the host's times. On other GPUs the shares are
extrapolated. On other hosts the times scale with the time of a small operation.
"""

from dataclasses import replace
from typing import NamedTuple

from sftlab.fastpath.mlp_ops import HOPPER, may_be_in_kernels
from sftlab.models.gated_mlp import NAMES
from sftlab.planning.gpu_specs import GPU, HOST_US
from sftlab.planning.step import Step, widths
from sftlab.planning.step_memory import has_fused_mlp, kept_bytes, recomputed_norms

# Share of the published matrix rate: a large product's, times that of a decoder's products on
# average.
MATRIX = 0.80 * 0.85
# The same for float32 products, of the float32 rate (results/float32/profile.csv).
MATRIX_FP32 = 0.75
# Attention's share of the matrix rate on rows of 512 tokens and less, and the most it reaches on
# longer ones.
ATTENTION = (0.14, 0.30)
# Attention in float32, of the 16-bit matrix rate: each product is three of TF32, at half the rate.
ATTENTION_FP32 = 0.14 / 6
# Share of the published memory rate that the kernels between a layer's products reach.
MEMORY = 0.68
# Bytes that these kernels move, forward and backward, for each byte that the layer keeps without
# LoRA. tests/test_pace.py counts this and the next two.
TRAFFIC_COMPILED, TRAFFIC_EAGER, TRAFFIC_EAGER_FP32 = 5.0, 13.7, 10.9
# Elements moved for each one that enters or leaves a linear with LoRA; float32 LoRA matrices have
# them cast and cast back.
LORA_COMPILED, LORA_EAGER, LORA_CASTS = 5.5, 8.0, 14.0
# The same where gate, up and down are one function with it, and where its kernels have LoRA in them
# too; fitted to whole runs (results/float8, captured_step, peers_8b, qlora; fused_lora_hopper).
LORA_FUSED, LORA_IN_KERNELS = 1.8, 1.0
# The same of gate, up and down where they are one function over float8 weights (results/float8),
# where LoRA is in its products too (results/float8_lora of then), and where it is in its kernels
# besides (results/peers_all_linears, results/peers_8b).
LORA_FLOAT8, LORA_FLOAT8_FUSED, LORA_FLOAT8_IN_KERNELS = 3.0, 2.2, 1.5
# The forward's share of both, which checkpointing moves again.
FORWARD, FORWARD_LORA = 0.32, 0.45
# Bytes moved for each element that enters or leaves a float8 product. Compiled, it is rounded in
# the kernel that makes it: written in 1, read in 1, and in part read again for its token's scale
# (results/float8). Uncompiled, every operation of `to_float8` reads and writes anew: 2 + 2, 2,
# 2 + 4, 4 + 4, 4 + 4, 4 + 1. Inputs are rounded in the forward, gradients of outputs in the
# backward.
TRAFFIC_FP8_COMPILED, TRAFFIC_FP8_EAGER, FORWARD_FP8 = 3.0, 33.0, 0.5
# How many times longer dequantising takes than reading 4 and writing 16 bits a weight. Taken to be
# so in float8 too, where it writes 8.
DEQUANTISING = 2.4
# Seconds of the host for a decoder layer, forward and backward, and for each module with LoRA in
# it.
HOST_COMPILED, HOST_EAGER = (2.7e-3, 0.36e-3), (4.4e-3, 0.86e-3)
# Seconds of one operation of torch's that is not compiled (an estimate).
HOST_OPERATION = 10e-6
# What a layer takes besides: float8 (eager, compiled), 4-bit weights.
HOST_FP8, HOST_QUANTIZED = (7.0e-3, 2.4e-3), 3.25e-3
# FSDP2's hooks: for a unit (one process, several, which wait for one another), and for each layer
# in it, whose weights are handled one by one. Their sums were measured on GPUs in units of a layer;
# how they split, on a CPU (docs/LOG.md, FSDP2 in units of several layers).
HOST_UNIT, HOST_UNIT_LAYER = (0.65e-3, 3.25e-3), 0.35e-3
# How many times longer both take with checkpointing: the forward runs again, and hooks pack and
# unpack every tensor.
HOST_CHECKPOINTED, HOST_AGAIN = 1.6, 1.2
# How many times longer the host takes where a reference runs forward too, which keeps nothing for
# a backward (an estimate).
HOST_REFERENCE = 1.4
# Seconds of a step in which the GPU waits for float16's loss scale to be checked for overflow.
HOST_SCALER = 0.010
# Seconds of the host for each tensor that bitsandbytes' optimizers update: 73 us were seen in a
# trace on a busy host, which is taken to be somewhat slower than others.
HOST_TENSOR = 0.06e-3
# Seconds of the host beside the layers: for a micro-batch (its rows, embedding, loss), for a step
# (optimizer, logs).
HOST_MICRO, HOST_STEP = 0.005, 0.007
# Share of the published rate of its products that a compiled step reaches with all that it does.
REACHED = 0.42
# Steps are captured by themselves where that saves so many: twice what recording some 40 sizes
# takes.
WORTH = 250
# How much more a captured micro-batch computes, to be of one of a few sizes.
FILLED_UP = 1.03
# Share of a link's published rate that a collective reaches.
LINK = 0.7


class StepTime(NamedTuple):
    """Seconds of one micro-batch and its share of the step, by part.

    All but `host` and `waiting` are the GPU's. `captured` says whether it is of captured steps.
    """

    matrices: float
    attention: float
    memory_traffic: float
    loss: float
    dequantising: float
    communication: float
    host: float
    waiting: float
    captured: bool = False

    @property
    def gpu(self) -> float:
        """Seconds that the GPU works; half of the products hide communication."""
        return sum(self[:5]) + max(0.0, self.communication - 0.5 * self.matrices)

    @property
    def seconds(self) -> float:
        """The GPU's or the host's time, whichever is longer.

        Where they are close, neither hides the other completely.
        """
        return (self.gpu**8 + self.host**8) ** 0.125 + self.waiting

    @property
    def bound(self) -> str:
        """What the step waits for: 'GPU' or 'host'."""
        return "GPU" if self.gpu >= self.host else "host"


def step_time(step: Step, gpu: GPU, captured: bool = False) -> StepTime:
    """Returns the seconds of a micro-batch on a GPU, of one that is captured if so."""
    host = host_seconds(step)
    if captured:
        step = replace(step, tokens=round(step.tokens * FILLED_UP))
        host = HOST_MICRO + (HOST_STEP + update_seconds(step)) / step.accumulation
    s, tokens, b = step.shape, step.tokens, step.compute_bytes
    bandwidth, slower = gpu.memory_gbs * 1e9, gpu.host_us / HOST_US
    scaler = HOST_SCALER * (step.precision == "fp16")
    moved = tokens * s.layers * traffic(step, _lora_in_kernels(step, gpu))
    return StepTime(
        matrices=_matrix_seconds(step, gpu),
        attention=_attention_seconds(step, gpu),
        memory_traffic=moved / (bandwidth * MEMORY),
        loss=(3 + step.reference) * b * tokens * s.vocabulary / bandwidth / 0.6,
        dequantising=_dequantised_bytes(step) / bandwidth,
        communication=_sent_bytes(step) / (gpu.link_gbs * 1e9 * LINK),
        host=host * slower,
        waiting=scaler / step.accumulation,
        captured=captured,
    )


def _matrix_seconds(step: Step, gpu: GPU) -> float:
    """Returns the seconds of the products of layers and head."""
    w, fp32 = step.weights, step.compute_bytes == 4
    reached = MATRIX_FP32 if fp32 else MATRIX
    layer_weights = w.linears * step.shape.layers
    # a product's forward, its input's gradient, its weight's where it is trained, the forward
    # again with checkpointing, and the reference's forward
    passes = 2.0 * (2 + (w.trained >= layer_weights) + step.checkpointing + step.reference)
    rate = gpu.tflops(step.precision) * 1e12
    head_rate = gpu.tflops("fp32" if fp32 else "bf16") * 1e12
    layers = step.tokens * passes * layer_weights / (rate * reached)
    if step.shape.experts:  # every pass reads all experts, however few tokens each has
        read = w.layer * step.shape.layers * passes / 2
        layers = max(layers, read / (gpu.memory_gbs * 1e9 * MEMORY))
    into_hidden = 2.0 / (rate if step.float8_head else head_rate)
    head = (2.0 + 2.0 * step.reference) / head_rate + into_hidden
    return layers + step.tokens * head * w.head / reached


def _attention_seconds(step: Step, gpu: GPU) -> float:
    s, fp32 = step.shape, step.compute_bytes == 4
    products = (3.5 + step.checkpointing + step.reference) * 2 * step.tokens * step.row_length
    flops = products * s.heads * s.head_size * s.layers
    if fp32 and step.packed:
        return flops / (gpu.tflops("bf16") * 1e12 * ATTENTION_FP32)
    share = min(ATTENTION[1], ATTENTION[0] * max(1.0, step.row_length / 512) ** 0.5)
    return flops / (gpu.tflops("fp32" if fp32 else "bf16") * 1e12 * share)


def _dequantised_bytes(step: Step) -> float:
    """Returns the bytes that dequantising 4-bit weights moves, scaled to how slow it is."""
    if not step.quantized:
        return 0.0
    times = 2 + step.checkpointing + step.reference
    each = 1.5 if step.precision == "fp8" else 2.5
    return each * step.weights.linears * step.shape.layers * times * DEQUANTISING


def _sent_bytes(step: Step) -> float:
    """Returns the bytes that a process sends to the others for a micro-batch."""
    w, others = step.weights, (step.processes - 1) / step.processes
    if step.strategy == "ddp":
        return 2 * w.gradients * others
    if step.strategy == "fsdp":
        times = 3 if step.checkpointing else 2
        return (times * w.layer * step.shape.layers + w.tail) * others
    return 0.0


def traffic(step: Step, lora_in_kernels: bool = False) -> float:
    """Returns the bytes a token that the kernels between a decoder layer's products move.

    Forward and backward together. `lora_in_kernels` says whether a fused MLP's kernels have LoRA's
    thin products in them.
    """
    s, b, again = step.shape, step.compute_bytes, step.checkpointing + step.reference
    uncompiled = TRAFFIC_EAGER_FP32 if b == 4 else TRAFFIC_EAGER
    if step.measured:  # what LoRA keeps is in it
        ratio = TRAFFIC_COMPILED if step.compiled else uncompiled
        computed = kept_bytes(step) + step.measured.again
        return computed * ratio * (1 + FORWARD * again) + 2 * step.measured.again
    ends = widths(step)
    with_lora = [ends[name] for name in step.targets if step.rank]
    bare = replace(step, targets=frozenset(), dropout=False)
    moved = (
        kept_bytes(bare)
        * (TRAFFIC_COMPILED if step.compiled else uncompiled)
        * (1 + FORWARD * again)
    )
    lora_again = step.checkpointing + (step.reference and step.reference_adapter)
    lora = sum(
        _lora_elements(step, name, lora_in_kernels) * sum(ends[name])
        for name in step.targets
        if step.rank
    )
    moved += b * lora * (1 + FORWARD_LORA * lora_again)
    moved += 2 * b * s.hidden * sum(recomputed_norms(step))
    # an element read and written, and a byte of mask; the same in the backward
    moved += step.dropout * (2 * b + 1) * sum(a for a, _ in with_lora) * (2 + again)
    if step.precision == "fp8":
        rounding = TRAFFIC_FP8_COMPILED if step.compiled else TRAFFIC_FP8_EAGER
        alone = [sum(ends[name]) for name in ends if not (step.float8_mlp and name in NAMES)]
        moved += rounding * sum(alone) * (1 + FORWARD_FP8 * again)
    return moved


def _lora_in_kernels(step: Step, gpu: GPU) -> bool:
    if gpu.capability[0] != HOPPER or step.compute_bytes != 2:
        return False
    return has_fused_mlp(step) and may_be_in_kernels(step.rank)


def _lora_elements(step: Step, name: str, lora_in_kernels: bool) -> float:
    """Returns the elements moved for each one that enters or leaves a linear with LoRA."""
    if not step.compiled:
        return LORA_CASTS if step.casts else LORA_EAGER
    if step.float8_mlp and name in NAMES:
        if step.fused_lora:
            return LORA_FLOAT8_IN_KERNELS if lora_in_kernels else LORA_FLOAT8_FUSED
        return LORA_FLOAT8
    if lora_in_kernels:
        return LORA_IN_KERNELS
    return LORA_FUSED if has_fused_mlp(step) else LORA_COMPILED


def update_seconds(step: Step) -> float:
    """Returns the seconds of the host for updates tensor by tensor, as bitsandbytes has them."""
    of_a_layer = 2 * adapters(step) if step.rank else len(widths(step)) + 2
    return HOST_TENSOR * step.updates_by_tensor * of_a_layer * step.shape.layers


def host_seconds(step: Step) -> float:
    """Returns the seconds of launching a micro-batch's kernels on the measured host."""
    layer, lora = HOST_COMPILED if step.compiled else HOST_EAGER
    own = layer + lora * adapters(step) * (step.rank > 0)
    if step.measured:  # a recurrence in torch is not compiled
        own = max(own, step.measured.operations * HOST_OPERATION)
    besides = HOST_FP8[step.compiled] * (step.precision == "fp8") + HOST_QUANTIZED * step.quantized
    if step.strategy == "fsdp":
        units = -(-step.shape.layers // step.layers_per_unit)
        unit = HOST_UNIT[step.processes > 1] * units / step.shape.layers
        besides += unit + HOST_UNIT_LAYER
    if step.checkpointing:
        own, besides = own * HOST_CHECKPOINTED, besides * HOST_AGAIN
    if step.reference:
        own, besides = own * HOST_REFERENCE, besides * HOST_REFERENCE
    a_step = HOST_STEP + update_seconds(step)
    return step.shape.layers * (own + besides) + HOST_MICRO + a_step / step.accumulation


def is_captured(step: Step, gpu: GPU) -> bool:
    """Returns whether micro-batches are captured: where that is asked for, or where it helps.

    It depends on sizes, on the GPU's kind and on nothing that is measured on the way.
    """
    if step.captured or not step.may_capture:
        return step.captured
    work = step.weights.flops.token * step.tokens * (1.5 if step.checkpointing else 1.0)
    rate = gpu.tflops("fp32" if step.precision == "fp32" else "bf16") * 1e12
    alone = work / (rate * REACHED)
    saved = 1 - alone / host_seconds(replace(step, accumulation=1))
    return saved > 0 and (step.steps is None or step.steps * step.accumulation * saved >= WORTH)


def adapters(step: Step) -> float:
    """Returns how many modules of a layer have LoRA."""
    return step.measured.adapters if step.measured else len(step.targets)
