"""What LoRA on the stacked weights of experts costs: peft's merged copy, and A and B alone.

python benchmarks/experts_lora.py [--shape qwen3-30b-a3b gpt-oss-20b] [--tokens 16384]
    [--rounds 5] [--out results/experts_lora]

One module of experts of that shape, r=16, forward and backward of random tokens sent to random
experts. On a GPU it is in bfloat16, and experts are multiplied in a grouped product. On a CPU it is
in float32, and --shape small fits. The ways take turns. `peak_mb` is what is allocated beside the
weights; `apart` is the largest difference of outputs and gradients from the first way, over their
norms.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn
from transformers import GptOssConfig, PreTrainedConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from sftlab.exit_messages import mistakes_in_one_line
from sftlab.fastpath.experts import GROUPED, ONE_BY_ONE
from sftlab.fastpath.experts_lora import FACTORED, adapted_experts, take_experts_lora
from sftlab.measurement.hardware_limit import synchronize
from sftlab.paths import ROOT
from sftlab.planning.live_memory import LiveMemory
from sftlab.runs.environment import provenance, typed_command
from sftlab.script_options import Options
from sftlab.tables import aligned, write_csv

SHOWN = ("shape", "product", "way", "seconds", "lowest", "highest", "peak_mb", "apart", "note")
COPY, ALONE, COMPILED = "peft's copy", "A and B alone", "A and B alone, compiled"
Tensors = dict[str, torch.Tensor]


class Shape(NamedTuple):
    """A class of experts, its config, and how many of them a token visits."""

    experts: type[nn.Module]
    config: PreTrainedConfig
    taken: int


def _qwen(experts: int, hidden: int, width: int) -> Shape:
    fields = {"num_local_experts": experts, "hidden_size": hidden, "moe_intermediate_size": width}
    return Shape(Qwen3MoeExperts, Qwen3MoeConfig(**fields), 8)


SHAPES = {
    "small": _qwen(64, 1024, 384),
    "qwen3-30b-a3b": _qwen(128, 2048, 768),
    "gpt-oss-20b": Shape(GptOssExperts, GptOssConfig(num_local_experts=32), 4),
}


class Holder(nn.Module):
    """What peft adapts the experts of."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.experts = shape.experts(shape.config)

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        """Returns what the experts return."""
        return self.experts(*given)


def main(argv: list[str]) -> None:
    """Measure every way of every shape, write the table, print it."""
    arguments, lines = parse_options(argv), []
    about = provenance() | {"command": typed_command("benchmarks/experts_lora.py", argv)}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.shape:
        for product in (GROUPED,) if torch.cuda.is_available() else (ONE_BY_ONE, GROUPED):
            found = measured(name, product, arguments)
            lines += [one | about for one in found]
            write_csv(arguments.out / "experts_lora.csv", lines)
            print(f"{name} measured, {product}", flush=True)
    print(aligned([list(SHOWN), *([str(line[name]) for name in SHOWN] for line in lines)]))


def parse_options(argv: list[str]) -> argparse.Namespace:
    """Returns the command line."""
    parser = Options(description=__doc__.splitlines()[0])
    usual = ["qwen3-30b-a3b", "gpt-oss-20b"] if torch.cuda.is_available() else ["small"]
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=usual)
    tokens = 16384 if torch.cuda.is_available() else 512
    parser.add_argument("--tokens", type=int, default=tokens)
    parser.add_argument("--rounds", type=int, default=5 if torch.cuda.is_available() else 3)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "experts_lora")
    return parser.parse_args(argv)


def measured(name: str, product: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns a row of the table for each way of a shape."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = random_experts(SHAPES[name], product, device, dtype)
    given = random_tokens(SHAPES[name], arguments.tokens, device, dtype)
    ways = [COPY, ALONE, *([COMPILED] if product == GROUPED and device == "cuda" else [])]
    compiled = torch.compile(model, dynamic=True)
    found = {way: {"seconds": [], "note": ""} for way in ways}
    for turn in range(arguments.rounds + 1):
        for way, cell in found.items():
            if cell["note"]:
                continue
            cell["note"] = take(model, way)
            seconds, tensors = timed(compiled if way == COMPILED else model, model, given)
            if turn:
                cell["seconds"].append(seconds)
                continue
            cell["tensors"] = tensors  # of the turn that warms up
            cell["peak_mb"] = round(peak_bytes(model, given) / 1e6, 1) if way != COMPILED else ""
    right = found[COPY]["tensors"]
    for cell in found.values():
        cell["apart"] = f"{difference(right, cell.pop('tensors')):.2g}"
    shape = {"shape": name, "product": product, "tokens": arguments.tokens, "dtype": str(dtype)}
    return [shape | {"way": way} | line_of(cell) for way, cell in found.items()]


def random_experts(shape: Shape, product: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Returns experts with random weights and random LoRA matrices on both of their weights."""
    shape.config._experts_implementation = product
    torch.manual_seed(0)
    with torch.device(device):
        holder = Holder(shape).to(dtype)
        for parameter in holder.parameters():
            nn.init.normal_(parameter, std=0.02)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_peft_model(
        holder, LoraConfig(r=16, target_modules=[], target_parameters=targets)
    ).train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32) * 0.02
    return model


def random_tokens(
    shape: Shape, tokens: int, device: str, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Returns hidden states, the experts of each token, and their weights."""
    scores = torch.rand(tokens, shape.config.num_local_experts, device=device)
    weights, chosen = scores.softmax(-1).topk(shape.taken)
    hidden = torch.randn(tokens, shape.config.hidden_size, device=device, dtype=dtype)
    return hidden.requires_grad_(), chosen, weights.to(dtype)


def take(model: nn.Module, way: str) -> str:
    """Let the experts compute in this way; returns why they cannot, '' where they can."""
    for layer in adapted_experts(model):
        layer.__class__ = lora.ParamWrapper
    if way == COPY:
        return ""
    taken, why = take_experts_lora(model)
    return "" if taken == FACTORED else str(why)


def timed(
    run: Callable[..., torch.Tensor], model: nn.Module, given: tuple[torch.Tensor, ...]
) -> tuple[float, Tensors]:
    """Returns the seconds of a forward and a backward, and outputs and gradients."""
    model.zero_grad()
    given[0].grad = None
    synchronize()
    started = time.perf_counter()
    out = run(*given)
    out.float().square().mean().backward()
    synchronize()
    seconds = time.perf_counter() - started
    trained = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    return seconds, {"out": out.detach(), "in": given[0].grad} | trained


def peak_bytes(model: nn.Module, given: tuple[torch.Tensor, ...]) -> int:
    """Returns the bytes of the tensors that live at once beside weights and inputs."""
    model.zero_grad()
    given[0].grad = None
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(*given).float().square().mean().backward()
        return torch.cuda.max_memory_allocated() - before
    with LiveMemory() as live:
        model(*given).float().square().mean().backward()
    return live.peak


def difference(right: Tensors, found: Tensors) -> float:
    """Returns the largest difference of a tensor, over its norm."""
    apart = [(found[k] - one).float().norm() / one.float().norm() for k, one in right.items()]
    return float(torch.stack(apart).max())


def line_of(cell: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of a way."""
    seconds = sorted(cell.pop("seconds"))
    rounded = [round(one, 5) for one in (statistics.median(seconds), seconds[0], seconds[-1])]
    return dict(zip(("seconds", "lowest", "highest"), rounded, strict=True)) | cell


if __name__ == "__main__":
    with mistakes_in_one_line():
        main(sys.argv[1:])
