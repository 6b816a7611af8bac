"""Compiled layers are found again by the next start, and never in place of others."""

import os
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest
import torch
from conftest import ROOT
from torch._functorch import config
from transformers import LlamaConfig, LlamaForCausalLM

from sftlab.fastpath.compile_layers import compile_layers

# a layer with a function of its own, whose gradient is `times` its input's
START = """
import sys, torch
from torch._dynamo.utils import counters
from sftlab.fastpath.compile_layers import _keep_graphs_of_functions as keep

class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, matrix, scale):
        ctx.save_for_backward(matrix)
        ctx.scale = scale
        return x @ matrix * FORWARD

    @staticmethod
    def backward(ctx, gradient):
        (matrix,) = ctx.saved_tensors
        return gradient @ matrix.t() * BACKWARD * ctx.scale, None, None

keep()
x, matrix = torch.ones(3, 4, requires_grad=True), torch.eye(4)
y = torch.compile(lambda x: Own.apply(x.relu(), matrix, SCALE).relu())(x)
y.sum().backward()
found = [counters["aot_autograd"][f"autograd_cache_{what}"] for what in ("hit", "miss")]
print(y[0, 0].item(), x.grad[0, 0].item(), *found)
"""


def start(folder: Path, forward: int, backward: int, scale: int) -> list[float]:
    """The output, the gradient, and how many graphs were found and not."""
    text = START.replace("FORWARD", str(forward)).replace("BACKWARD", str(backward))
    (folder / "start.py").write_text(text.replace("SCALE", str(scale)))
    done = subprocess.run(
        [sys.executable, str(folder / "start.py")],
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(word) for word in done.stdout.split()]


def test_compiled_layers_keep_graphs_with_functions_of_their_own(monkeypatch):
    name = "autograd_cache_allow_custom_autograd_functions"
    monkeypatch.setattr(config, name, False)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    compile_layers(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1)))
    assert getattr(config, name)
    assert torch._functorch.config.enable_autograd_cache


@pytest.mark.long
@pytest.mark.skipif(not (which("g++") or which("clang++")), reason="there is no C++ compiler")
def test_a_graph_is_found_again_and_not_in_place_of_another(tmp_path):
    assert start(tmp_path, 2, 3, 5) == [2, 15, 0, 1]
    assert start(tmp_path, 2, 3, 5) == [2, 15, 1, 0]
    assert start(tmp_path, 2, 7, 5) == [2, 35, 0, 1], "another backward"
    assert start(tmp_path, 4, 3, 5) == [4, 15, 0, 1], "another forward"
    assert start(tmp_path, 2, 3, 1) == [2, 3, 0, 1], "another constant of the backward"
    assert start(tmp_path, 2, 3, 5) == [2, 15, 1, 0]
