"""Recipes and forecasts for the tests of planning."""

import sys
from types import ModuleType

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from transformers import LlamaConfig

from sftlab.config.launch import exported, launched
from sftlab.config.parser import parse_recipe
from sftlab.fastpath import varlen_attention
from sftlab.models.random_models import MODEL_SHAPES
from sftlab.planning.gpu_specs import GPUS
from sftlab.planning.plan import make_plan
from sftlab.planning.row_lengths import RowLengths

RECIPE = ["--config", "recipes/llama3.2-1b/attn_r16.yaml"]
SAID = [*RECIPE, "--random", "llama3.2-1b", "--rows", "38105", "--row_tokens", "315"]
ATTENTION = ["q_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "k_proj", "gate_proj", "up_proj", "down_proj"]

# runs what inductor would compile, after its partitioner
PARTITIONED = aot_autograd(
    fw_compiler=lambda graph, _: graph.forward,
    bw_compiler=lambda graph, _: graph.forward,
    partition_fn=min_cut_rematerialization_partition,
    decompositions=select_decomp_table(),
)


def kernels_without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the variable-length kernels give their shapes on a CPU."""
    stub = ModuleType("sftlab.fastpath.triton_kernels")
    stub.attention_forward = lambda q, k, v, *_: (
        torch.zeros(*q.shape[:2], v.shape[-1], dtype=q.dtype),
        torch.zeros(q.shape[1], q.shape[0]),
    )
    stub.attention_backward = lambda g, q, k, v, *_: tuple(map(torch.zeros_like, (q, k, v)))
    monkeypatch.setitem(sys.modules, "sftlab.fastpath.triton_kernels", stub)
    varlen_attention.register()


def forecast(launch="single", gpu="h200", rows=None, shape="llama3.2-1b", flags=None, **fields):
    targets = fields.pop("targets", None)
    argv = [*RECIPE, *(f"--{k}={v}" for k, v in fields.items())]
    argv += ["--lora_target_modules", *targets] if targets else []
    with launched(exported(f"accelerate_configs/{launch}.yaml", flags)) as asked:
        recipe = parse_recipe(argv, asked)
        rows = rows or RowLengths(38_000, 315, 140, 512, "said")
        return make_plan(recipe, LlamaConfig(**MODEL_SHAPES[shape]), asked, GPUS[gpu], rows)
