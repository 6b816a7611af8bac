"""What the plan says that a layer's kernels move, against what they do move, counted on a CPU."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from shutil import which

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._inductor import metrics
from torch._inductor.async_compile import AsyncCompile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from sftlab.models.layers import describe
from sftlab.planning.step import Shape, Step, widths
from sftlab.planning.step_time import TRAFFIC_COMPILED, traffic
from sftlab.planning.weight_memory import Weights

# The proportions of Llama-3.2-1B and of Llama-2-7B, an eighth as wide.
TIMED_SHAPES = {
    "1b": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
    },
    "7b": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
}
# each of these takes a third of a minute to compile
LONG = pytest.mark.long
ATTENTION = frozenset({"q_proj", "v_proj", "o_proj"})
ALL = ATTENTION | {"k_proj", "gate_proj", "up_proj", "down_proj"}
# They make a view, or nothing.
MOVE_NOTHING = {
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "as_strided",
    "detach",
    "empty",
    "expand",
    "permute",
    "select",
    "slice",
    "split",
    "squeeze",
    "t",
    "transpose",
    "unsqueeze",
    "view",
}


class Moved(TorchDispatchMode):
    """Adds up the bytes that operations read and write, attention's apart:

    a plan has a part of its own for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        if name not in MOVE_NOTHING and "attention" not in name:
            tensors = [x for x in tree_leaves((args, kwargs, made)) if isinstance(x, torch.Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors if x.numel() > 1)
        return made


def config_of(shape: str) -> LlamaConfig:
    """A decoder of one layer."""
    return LlamaConfig(
        **TIMED_SHAPES[shape], num_hidden_layers=1, vocab_size=64, attn_implementation="sdpa"
    )


def layer_of(
    shape: str, targets: frozenset[str], dtype: torch.dtype, lora32: bool
) -> tuple[LlamaForCausalLM, Callable]:
    """A decoder with LoRA on it, and its layer."""
    model = LlamaForCausalLM._from_config(config_of(shape), dtype=dtype)
    model.requires_grad_(False)
    if targets:
        lora = LoraConfig(r=2, target_modules=sorted(targets), lora_dropout=0.0)
        get_peft_model(model, lora, autocast_adapter_dtype=lora32)
    return model, model.model.layers[0]


def passes(model: LlamaForCausalLM, layer: Callable, tokens: int, dtype: torch.dtype) -> None:
    """The layer forward and backward."""
    x = torch.randn(1, tokens, model.config.hidden_size, dtype=dtype, requires_grad=True)
    positions = model.model.rotary_emb(x, torch.arange(tokens)[None])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        layer(x, position_embeddings=positions).backward(torch.ones_like(x))


def eager(
    shape: str, targets: frozenset[str], dtype: torch.dtype, lora32: bool, again: bool
) -> float:
    """Bytes a token; what does not go by tokens (the weights) is left out.

    `again`: checkpointed.
    """
    counts = []
    for tokens in (8, 24):
        model, layer = layer_of(shape, targets, dtype, lora32)
        layer = partial(checkpoint, layer, use_reentrant=False) if again else layer
        with Moved() as moved:
            passes(model, layer, tokens, dtype)
        counts.append(moved.bytes)
    return (counts[1] - counts[0]) / 16


def compiled(step: Step, shape: str) -> float:
    """The same in bf16 as inductor counts it of its kernels, without attention's operands and the
    weights.
    """
    model, layer = layer_of(shape, step.targets, torch.bfloat16, True)
    metrics.reset()
    passes(model, torch.compile(layer.forward), 1024, torch.bfloat16)
    query, key = (
        heads * step.shape.head_size for heads in (step.shape.heads, step.shape.key_heads)
    )
    weights = 2 * step.compute_bytes * sum(a * z for a, z in widths(step).values())
    return (metrics.num_bytes_accessed - weights) / 1024 - step.compute_bytes * 6 * (query + key)


def step_of(
    shape: str, targets: frozenset[str], dtype: torch.dtype, lora32: bool, **more: bool
) -> Step:
    """The layer to the planner."""
    precision = "fp32" if dtype == torch.float32 else "bf16"
    weights = Weights(*[0] * 10, None)
    # 4-bit weights have LoRA matrices in the compute dtype, others in float32
    return Step(
        Shape.of(config_of(shape), describe(config_of(shape), LlamaForCausalLM)),
        weights,
        precision,
        targets,
        2 if targets else 0,
        64,
        64.0,
        quantized=precision == "bf16" and not lora32,
        weight_bytes=4 if precision == "fp32" else 2,
        **more,
    )


def products(step: Step) -> float:
    """Bytes of the frozen products' operands; LoRA's own count as LoRA's."""
    return (
        (2 + step.checkpointing) * step.compute_bytes * sum(a + z for a, z in widths(step).values())
    )


@pytest.mark.parametrize("shape", TIMED_SHAPES)
@pytest.mark.parametrize(
    ("dtype", "lora32"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)]
)
def test_eager_layers_move_what_the_plan_says(shape, dtype, lora32):
    for targets in (frozenset(), ATTENTION, ALL):
        for again in (False, True):
            step = step_of(shape, targets, dtype, lora32, compiled=False, checkpointing=again)
            moved = eager(shape, targets, dtype, lora32, again) - products(step)
            assert traffic(step) == pytest.approx(moved, rel=0.12), (targets, again)


@pytest.mark.skipif(
    not (which("g++") or which("clang++")), reason="there is no C++ compiler for inductor"
)
@pytest.mark.parametrize(
    ("shape", "targets"),
    [("1b", frozenset()), ("1b", ALL), ("7b", ALL)],
)
@LONG
def test_compiled_layers_move_what_the_plan_says(shape, targets, monkeypatch):
    monkeypatch.setattr(
        torch._inductor.compile_fx.inductor_metrics_log, "isEnabledFor", lambda level: True
    )
    # the kernels are generated and counted, but what C++ makes of them does not matter here
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *_: lambda *tensors: None)
    torch.compiler.reset()
    with torch.compiler.config.patch(force_disable_caches=True):
        step = step_of(shape, targets, torch.bfloat16, True)
        moved = compiled(step, shape) - products(step)
    assert traffic(step) == pytest.approx(moved, rel=0.12)


def test_a_norm_that_is_computed_again_is_read_and_written_once_more():
    for targets, norms in ((ATTENTION, 1), (ALL, 2)):
        step = step_of("1b", targets, torch.bfloat16, False)
        kept = traffic(replace(step, keeps_inputs=True))
        # its scales, in float32, are not kept
        assert traffic(step) - kept == pytest.approx(norms * 2 * 2 * 256 - TRAFFIC_COMPILED * 8)
        for as_before in (replace(step, checkpointing=True), replace(step, compiled=False)):
            assert traffic(as_before) == traffic(replace(as_before, keeps_inputs=True))


def test_dropout_and_float8_move_more():
    step = step_of("1b", ATTENTION, torch.bfloat16, True, compiled=False)
    into = sum(a for name, (a, _) in widths(step).items() if name in ATTENTION)
    every = sum(a + z for a, z in widths(step).values())
    for again, times, forward in ((False, 2, 1.0), (True, 3, 1.5)):
        base = traffic(replace(step, checkpointing=again))
        # an element read and written, and a byte of mask
        assert traffic(replace(step, checkpointing=again, dropout=True)) - base == pytest.approx(
            5 * times * into
        )
        assert traffic(replace(step, checkpointing=again, precision="fp8")) - base == pytest.approx(
            33 * every * forward
        )
