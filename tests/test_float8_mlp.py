"""An MLP over float8 weights as one function computes what its linears do one by one.

Without a GPU, Triton's interpreter runs its kernels, in a process of its own, as for
tests/test_kernels.py. It rounds float8 otherwise than GPUs do, so the kernels store float32 there.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig

from sftlab.fastpath import float8_mlp
from sftlab.fastpath.float8 import BACKWARD, FORWARD, freeze_in_float8, to_float8
from sftlab.fastpath.float8_mlp import Float8Mlp, fuse_float8_mlps
from sftlab.models.gated_mlp import activation

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
on_a_gpu = torch.cuda.is_available()
needs_a_gpu = pytest.mark.skipif(not on_a_gpu, reason="compiled kernels run on a GPU")
runs_kernels = pytest.mark.skipif(
    not (on_a_gpu or interpreted), reason="run under Triton's interpreter, by the test below"
)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
CONFIGS = {  # Gemma's activation is the tanh form of GELU
    "llama": LlamaConfig(**SIZES),
    "gemma": GemmaConfig(**SIZES, head_dim=16, pad_token_id=0),
}
GATED = ["gate_proj", "up_proj", "down_proj"]
TARGETS = {"none": ["q_proj"], "all": GATED, "down": ["down_proj"], "up": ["up_proj"]}
# a value on the border of two float8 numbers goes either way, by a quarter of itself at most
ROUNDING = 0.03


def room(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, torch.nan, device="cuda" if on_a_gpu else "cpu").to(dtype)


def check_rounded(rounded, scale, exact, dtype):
    """Compare with `to_float8`: all but those on the border of two numbers are the same."""
    expected, expected_scale = to_float8(exact, dtype, by_row=True)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0)
    if interpreted:
        largest = torch.finfo(dtype).max
        assert rounded.abs().max() <= largest
        torch.testing.assert_close(rounded * scale, exact, rtol=1e-5, atol=1e-5)
        rounded = rounded.to(dtype)
    assert (rounded.float() == expected.float()).float().mean() > 0.999


@runs_kernels
@pytest.mark.parametrize("tanh_gelu", [False, True])
@pytest.mark.parametrize("size", [16, 96, 1024] if interpreted else [96, 1024, 8192, 11008, 16384])
@pytest.mark.parametrize("keep", [False, True])
def test_kernels_are_plain_torch(tanh_gelu, size, keep):
    from sftlab.fastpath import float8_mlp_kernel

    torch.manual_seed(0)
    dtype = torch.float32 if interpreted else torch.bfloat16
    gate, up, into = (room(5, size, dtype=dtype).normal_(std=2) for _ in range(3))
    gate[1] *= 1e-3
    into[2] = 0
    for tensor in (gate, up):
        tensor[3] = 0
    exact = [tensor.float().requires_grad_() for tensor in (gate, up)]
    act = activation(exact[0], tanh_gelu) * exact[1]
    gradients = torch.autograd.grad(act, exact, into.float())
    closeness = {"rtol": 1e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}

    rounded, scale = room(5, size, dtype=dtype if interpreted else FORWARD), room(5, 1, dtype=dtype)
    scale, kept = scale.float(), room(5, size, dtype=dtype)
    float8_mlp_kernel.gated_to_float8(
        gate, up, tanh_gelu, rounded, scale, kept if keep else None, torch.finfo(FORWARD).max
    )
    check_rounded(rounded, scale, act.detach(), FORWARD)
    assert kept.isnan().all() or keep
    if keep:
        torch.testing.assert_close(kept.float(), act.detach(), **closeness)

    pair = [room(5, size, dtype=dtype if interpreted else BACKWARD) for _ in range(2)]
    scales = [room(5, 1, dtype=torch.float32) for _ in range(2)]
    whole = [room(5, size, dtype=dtype) for _ in range(2)]
    changed = into.clone()
    float8_mlp_kernel.gated_backward_to_float8_(
        changed, gate, up, tanh_gelu, pair, scales, whole if keep else None, keep,
        torch.finfo(BACKWARD).max,
    )  # fmt: skip
    for place, gradient in enumerate(gradients):
        check_rounded(pair[place], scales[place], gradient, BACKWARD)
        if keep:
            torch.testing.assert_close(whole[place].float(), gradient, **closeness)
    expected = act.detach() if keep else into.float()
    torch.testing.assert_close(changed.float(), expected, **closeness)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(interpreted or on_a_gpu, reason="the kernels run here themselves")
def test_the_kernels_run_under_tritons_interpreter():
    words = ["-q", "-p", "no:cacheprovider", __file__, "-k", "kernels_are_plain"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "12 passed" in done.stdout


def build(config: str = "llama", targets: str = "all", **fields: object) -> PeftModel:
    """A small model over float8 weights whose LoRA, in float32, is not zero."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(deepcopy(CONFIGS[config])).bfloat16()
    lora = {"r": 8, "lora_alpha": 24, "target_modules": TARGETS[targets]} | fields
    found = get_peft_model(base, LoraConfig(**lora))
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    freeze_in_float8(found)
    return found.train()


def mlp(model: PeftModel) -> nn.Module:
    return model.get_base_model().model.layers[0].mlp


def output_and_gradients(module: nn.Module, run: Callable | None = None) -> dict:
    torch.manual_seed(1)
    x = torch.randn(2, 40, 64).bfloat16().requires_grad_()
    weights = torch.randn(2, 40, 64).bfloat16()
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = (run or module)(x)
    assert output.dtype == torch.bfloat16 and output.shape == x.shape
    (output * weights).sum().backward()
    gradients = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    return {"output": output.detach(), "x": x.grad} | gradients


def difference(one: dict, other: dict) -> float:
    """The largest norm of a tensor's difference, over the tensor's norm."""
    assert one.keys() == other.keys()
    pairs = ((one[k].float(), other[k].float()) for k in one)
    return max(((mine - plain).norm() / plain.norm()).item() for mine, plain in pairs)


@pytest.fixture
def whole(monkeypatch) -> list[int]:
    """Has an entry, its rows, for every MLP that was computed as one function."""
    found, plain = [], float8_mlp.gated_to_float8

    def gated_to_float8(gate, *rest):
        found.append(len(gate))
        return plain(gate, *rest)

    monkeypatch.setattr(float8_mlp, "gated_to_float8", gated_to_float8)
    return found


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("targets", TARGETS)
def test_the_output_and_every_gradient_are_those_of_linears_one_by_one(config, targets, whole):
    model = build(config, targets)
    plain = output_and_gradients(mlp(model))
    names = [list(model.state_dict()), list(get_peft_model_state_dict(model))]
    assert whole == []
    assert fuse_float8_mlps(model) == 1
    found = output_and_gradients(mlp(model))
    assert whole == [80]
    print(difference(found, plain))
    assert difference(found, plain) < ROUNDING
    assert [list(model.state_dict()), list(get_peft_model_state_dict(model))] == names
