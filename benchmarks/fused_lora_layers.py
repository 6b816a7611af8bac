"""How long do fused LoRA's kernels take beside torch's, and a decoder layer beside peft's?

python benchmarks/fused_lora_layers.py [--parts kernels layers sweep] [--tokens 20370 6644] \
    [--variants NAME ...] [--rounds 5] [--seconds 120] [--out results/fused_lora_layers]

One GPU, Llama-3.2-1B's shape, LoRA r=16 on all seven linears, no dropout, bf16. `layers` compiles a
decoder layer for each variant, over rows of 315 tokens. Forwards and backwards are timed in turn.
Ratios are of the same round: to peft's layer, and to what was fused before the MLP was one
function. `difference` is the norm of that from peft over peft's norm, the largest of the output and
all gradients. A and B are copied once a forward of the model: that is not timed.

`kernels` and `sweep` start benchmarks/fused_lora_kernels.py, without and with --sweep.

What fails says why as `note`, and SFTLAB_TRACEBACK=1 prints where. At --seconds it ends with what
there is. Tables are layers.csv, kernels.csv and sweep.csv, each written after every line.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sftlab.data.tiles import tiles
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.fastpath import compile_layers, varlen_attention
from sftlab.fastpath.fused_lora import fuse_lora
from sftlab.fastpath.lora_mlp import LoraMlp
from sftlab.fastpath.lora_products import LoraProduct, copy_matrices
from sftlab.measurement.layer_shape import LayerShape as Shape
from sftlab.paths import ROOT
from sftlab.runs.environment import provenance, typed_command
from sftlab.script_options import Options
from sftlab.tables import preview, write_csv

# the share of the time in which a variant must begin to compile, and steps of a turn
START, STEPS = 0.8, 5
ROW = 315
SHOWN = ("variant", "tokens", "note", "first_s", "layer_us", "times_peft", "times_before")


class Variant(NamedTuple):
    """What of a layer is fused."""

    fused: bool = True
    mlp: bool = True  # the MLP is one function
    copied: bool = True  # gradients of q, k and v are copied by a kernel of their own


PEFT, BEFORE = "peft", "fused before"
VARIANTS = {
    PEFT: Variant(fused=False),
    BEFORE: Variant(mlp=False, copied=False),
    "fused": Variant(),
    "fused, the MLP alone": Variant(copied=False),
    "fused, the copy alone": Variant(mlp=False),
}


def main(argv: list[str] | None = None, shape: Shape | None = None) -> None:
    """Measure the parts, in the order in which they are given."""
    options = parse_options(argv)
    if shape is None and (why := varlen_attention.no_triton()):
        raise ValueError(f"this needs a GPU that runs the kernels of fused LoRA: {why}")
    options.out.mkdir(parents=True, exist_ok=True)
    typed = typed_command("benchmarks/fused_lora_layers.py", argv or sys.argv[1:])
    about = provenance() | {"command": typed}
    for part in options.parts:
        if part == "layers":
            table = {}
            for line in measure_layers(options, shape or Shape()):
                table[line["variant"], line["tokens"]] = line
                write_csv(options.out / "layers.csv", [one | about for one in table.values()])
                shown = (f"{name} {line[name]}" for name in SHOWN if line.get(name, "") != "")
                print(", ".join(shown), flush=True)
        else:
            line = {"note": ""}
            attempt(line, options.end, partial(start_kernels, part, options, about["command"]))
            print(f"{part}: {line['note'] or 'done'}", flush=True)


def start_kernels(part: str, options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Time the kernels in a process of its own, which writes its table."""
    left = options.end - time.monotonic()
    words = [sys.executable, ROOT / "benchmarks" / "fused_lora_kernels.py", f"--seconds={left:.0f}"]
    words += ["--tokens", *map(str, options.tokens), *(["--sweep"] if part == "sweep" else [])]
    words += ["--command", command, "--out", options.out]
    subprocess.run(words, check=True, timeout=left + 30)
    return {}


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Returns the command line, and when the time is over."""
    began, parser = time.monotonic(), Options(description=__doc__.splitlines()[0])
    every, parts = list(VARIANTS), ["kernels", "layers", "sweep"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts[:2])
    parser.add_argument("--tokens", nargs="+", type=int, default=[20370, 6644], help="of a step")
    parser.add_argument("--variants", nargs="+", choices=every, default=every, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=120, help="when to end (default: 120)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "fused_lora_layers")
    options = parser.parse_args(argv)
    if min(*options.tokens, options.rounds) < 1:
        parser.error("--tokens and --rounds: expected numbers of at least 1")
    options.start, options.end = (began + share * options.seconds for share in (START, 1))
    return options


def attempt(line: dict[str, Any], deadline: float, measure: Callable[[], dict]) -> None:
    """Add to a line what a function returns, or as `note` why it returns nothing."""
    late = time.monotonic() > deadline
    line["note"] = line["note"] or ("no time was left" if late else "")
    if line["note"]:
        return
    try:
        line |= measure()
    except Exception as error:  # a failure costs its own line alone
        if os.environ.get("SFTLAB_TRACEBACK") == "1":
            traceback.print_exc()
        line["note"] = preview(f"{type(error).__name__}: {error}", 300)


def spread(name: str, values: list[float], digits: int) -> dict[str, Any]:
    """Returns the median of values, the lowest and the highest, as three columns."""
    columns = (name, f"{name}_lowest", f"{name}_highest")
    if not values:
        return dict.fromkeys(columns, "")
    found = (statistics.median(values), min(values), max(values))
    return {column: round(one, digits) for column, one in zip(columns, found, strict=True)}


def measure_layers(options: argparse.Namespace, shape: Shape) -> Iterator[dict[str, Any]]:
    """Yields a line for each variant and number of tokens, again after each round."""
    both, layers = itertools.product(options.variants, options.tokens), Layers(shape, {}, {})
    lines = {key: {"variant": key[0], "tokens": key[1], "note": ""} for key in both}
    for key, line in lines.items():
        attempt(line, options.start, partial(layers.first_step, *key))
        yield line
    for number, tokens in itertools.product(range(1, options.rounds + 1), options.tokens):
        for name in options.variants:
            turn = partial(layers.turn, name, tokens, f"round_{number}")
            attempt(lines[name, tokens], options.end, turn)
        for name in options.variants:
            others = [lines.get((other, tokens), {}) for other in (PEFT, BEFORE)]
            yield lines[name, tokens] | compared(lines[name, tokens], *others)
        if time.monotonic() > options.end:
            return


class Layers(NamedTuple):
    """Layers of the variants: each graph is built once. And what peft's gives for each input."""

    shape: Shape
    decoders: dict[Variant, nn.Module]
    expected: dict[int, dict[str, torch.Tensor]]

    def first_step(self, name: str, tokens: int) -> dict[str, Any]:
        """Do a step, which compiles. Returns its seconds, its memory, and how far it is off."""
        began = time.monotonic()
        found, line = self.step(name, tokens)(), {"difference": ""}
        if name == PEFT:
            self.expected[tokens] = found
        if expected := self.expected.get(tokens):
            pairs = [(found[leaf].float(), one.float()) for leaf, one in expected.items()]
            far = torch.stack([(one - other).norm() / other.norm() for one, other in pairs])
            line["difference"] = f"{far.max().item():.1e}"
        line["first_s"] = round(time.monotonic() - began, 1)
        return line | {"step_gb": added_gb(self.step(name, tokens))}

    def turn(self, name: str, tokens: int, column: str) -> dict[str, Any]:
        """Returns the microseconds of a step on a GPU, the mean of some after one that warms up."""
        step = self.step(name, tokens)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        step()
        begin.record()
        for _ in range(STEPS):
            step()
        end.record()
        torch.cuda.synchronize()
        return {column: round(1e3 * begin.elapsed_time(end) / STEPS, 1)}

    def step(self, name: str, tokens: int) -> Callable[[], dict[str, torch.Tensor]]:
        """Returns what does a step of a variant, with random inputs that are made here."""
        variant = VARIANTS[name]
        if variant not in self.decoders:
            self.decoders[variant] = build(variant, self.shape)
        decoder = self.decoders[variant]
        given = inputs_of_layer(decoder, tokens, self.shape)
        return partial(outcome, decoder.layers[0], **given)


def compared(line: dict[str, Any], peft: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Returns a layer's times, and its ratios to two others in the same rounds."""
    rounds = [name for name in line if name.startswith("round_")]
    found = {"rounds": len(rounds)} | spread("layer_us", [line[name] for name in rounds], 1)
    for name, other in (("times_peft", peft), ("times_before", before)):
        found |= spread(name, [line[one] / other[one] for one in rounds if one in other], 3)
    return found


def build(variant: Variant, shape: Shape) -> nn.Module:
    """Returns the decoder of a random model of one layer, compiled if it is on a GPU."""
    on_gpu = shape.device == "cuda"
    if on_gpu:
        varlen_attention.register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=shape.hidden, intermediate_size=shape.mlp, num_hidden_layers=1,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_heads,
        attn_implementation=varlen_attention.NAME if on_gpu else "sdpa",
    )  # fmt: skip
    with torch.device(shape.device):
        base = LlamaForCausalLM(config).to(shape.dtype)
    lora = LoraConfig(r=shape.rank, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, lora).train()
    if variant.fused and (left := fuse_lora(model, shape.dtype)):
        raise RuntimeError(f"not fused: {left}")
    groups = dict.fromkeys(m.together for m in base.modules() if isinstance(m, LoraProduct))
    for group in groups:
        group.far &= variant.copied
    for mlp in [m for m in base.modules() if isinstance(m, LoraMlp) and not variant.mlp]:
        mlp.__class__ = type(mlp).__bases__[1]  # the model's own
    copy_matrices(list(groups))
    if on_gpu:
        compile_layers.compile_layers(base)
    return base.model


def inputs_of_layer(decoder: nn.Module, tokens: int, shape: Shape) -> dict[str, Any]:
    """Returns rows of random tokens, where they are, and the gradient of their output."""
    torch.manual_seed(1)
    x, gradient = (torch.randn(1, tokens, shape.hidden, device=shape.device) for _ in range(2))
    lengths = [min(ROW, tokens - start) for start in range(0, tokens, ROW)]
    ids = torch.cat([torch.arange(n) for n in lengths])[None].to(shape.device)
    given = {"x": x.to(shape.dtype).requires_grad_(), "gradient": gradient.to(shape.dtype)}
    given |= {"position_embeddings": decoder.rotary_emb(given["x"], ids), "position_ids": ids}
    if shape.device == "cuda":
        given["tiles"] = tiles(lengths).to(shape.device)
    return given


def outcome(
    layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor, **more: object
) -> dict[str, torch.Tensor]:
    """Do a forward and a backward. Returns the output and every gradient."""
    leaves = {"x": x} | {name: p for name, p in layer.named_parameters() if p.requires_grad}
    for leaf in leaves.values():
        leaf.grad = None
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        found = layer(x, attention_mask=None, **more)
    found.backward(gradient)
    return {"output": found.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def added_gb(call: Callable[[], object]) -> float:
    """Returns the GB that a call adds to a GPU's memory at its peak."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return round((torch.cuda.max_memory_allocated() - before) / 1e9, 3)


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
