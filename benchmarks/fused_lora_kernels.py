"""How long do the kernels of fused LoRA take, how exact are they, and what does torch need?

python benchmarks/fused_lora_kernels.py [--sweep] [--tokens 20370 6644] [--seconds 60] \
    [--out results/fused_lora_layers]

The kernels and operations of an MLP of Llama-3.2-1B's shape with LoRA r=16, in bf16 on one GPU, and
the copy of the gradients of q, k and v. benchmarks/fused_lora_layers.py starts this too, so that a
kernel which breaks the context of the GPU does so in a process of its own.

`torch_us` is torch's path of the same, uncompiled, as a CPU takes it. `error` is the largest
difference from that path in float64, over the largest value. `gb_per_s` counts what must be read
and written once. `form` is how a kernel is launched: sftlab/fastpath/mlp_kernel.py says what its
numbers mean. With --sweep kernels have other forms too.

What fails says why as `note`, and SFTLAB_TRACEBACK=1 prints where. At --seconds it ends with what
there is. The table is kernels.csv, or sweep.csv, and is written after every line.
"""

import argparse
import itertools
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from sftlab.exit_messages import mistakes_in_one_line
from sftlab.fastpath import mlp_ops
from sftlab.fastpath.joined_product import Form, for_gradients, for_outputs
from sftlab.measurement.layer_shape import LayerShape as Shape
from sftlab.paths import ROOT
from sftlab.runs.environment import provenance, typed_command
from sftlab.script_options import Options
from sftlab.tables import preview, write_csv

NO_TIME = "no time was left"
RANKS = 64  # what ranks are padded to
# forms that a sweep tries
ROWS = "1,512,4 1,1024,2 2,512,4 2,1024,4 2,1024,8 1,2048,4 1,2048,8 1,4096,8 4,512,4 4,1024,8"
COPIES = "1,512,2 2,512,4 4,512,8 8,512,4 8,512,8 4,1024,8 1,4096,8 2,4096,8"


class Case(NamedTuple):
    """What is timed, and its forms: kernels without one are done by torch.

    `moved` elements are read and written for a token. A sweep tries the forms in `swept` too.
    """

    call: Callable[[SimpleNamespace, tuple], list[torch.Tensor]]
    forms: tuple[tuple, ...]
    moved: int = 0
    swept: str = ""


def main(argv: list[str] | None = None, shape: Shape | None = None) -> None:
    """Time what is there, and write a line for each."""
    options = parse_options(argv)
    if shape is None and not torch.cuda.is_available():
        raise ValueError("this needs a GPU that runs the kernels of fused LoRA, and there is none")
    options.out.mkdir(parents=True, exist_ok=True)
    about, lines = provenance() | {"command": options.command}, []
    for line in measured(options, shape or Shape()):
        lines.append(line | about)
        write_csv(options.out / f"{'sweep' if options.sweep else 'kernels'}.csv", lines)
        print(shown(line), flush=True)


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Returns the command line, and when the time is over."""
    began, parser = time.monotonic(), Options(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="kernels in other forms")
    parser.add_argument("--tokens", nargs="+", type=int, default=[20370, 6644], help="of a step")
    parser.add_argument("--seconds", type=float, default=60, help="when to end (default: 60)")
    parser.add_argument("--command", help="what the table calls the command (default: this one)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "fused_lora_layers")
    options = parser.parse_args(argv)
    if min(options.tokens) < 1:
        parser.error(f"--tokens {min(options.tokens)}: expected a number of at least 1")
    typed = typed_command("benchmarks/fused_lora_kernels.py", argv or sys.argv[1:])
    options.command = options.command or typed
    options.end = began + options.seconds
    return options


def shown(line: dict[str, Any]) -> str:
    """Returns a line for a reader."""
    name = f"{line['kernel']} ({line['form'] or 'as it is'}), {line['tokens']} tokens"
    if line["note"]:
        return f"{name}: {line['note']}"
    speed = f", {line['gb_per_s']} GB/s" if line["gb_per_s"] else ""
    torchs = f", torch {line['torch_us']} us" if "torch_us" in line else ""
    return f"{name}: {line['us']} us{speed}{torchs}, error {line['error']}"


def measured(options: argparse.Namespace, shape: Shape) -> Iterator[dict[str, Any]]:
    """Yields a line for each kernel and operation, or for each form of those that have others."""
    for tokens, (name, case) in itertools.product(options.tokens, cases(shape).items()):
        swept = [tuple(map(int, form.split(","))) for form in case.swept.split()]
        forms = ([*case.forms, *swept] if swept else []) if options.sweep else case.forms
        for form in forms:
            line = {"kernel": name, "form": " ".join(map(str, form)), "tokens": tokens, "note": ""}
            if time.monotonic() > options.end:
                yield line | {"note": NO_TIME}
                return
            try:
                line |= kernel_line(case, form, tokens, shape, beside_torch=not options.sweep)
            except Exception as error:  # a failure costs its own line alone
                if os.environ.get("SFTLAB_TRACEBACK") == "1":
                    traceback.print_exc()
                line["note"] = preview(f"{type(error).__name__}: {error}", 300)
            yield line


@contextmanager
def switched(**switches: object) -> Iterator[None]:
    """Give names of mlp_ops.py other values."""
    before = {name: getattr(mlp_ops, name) for name in switches}
    vars(mlp_ops).update(switches)
    try:
        yield
    finally:
        vars(mlp_ops).update(before)


def kernel_line(
    case: Case, form: tuple, tokens: int, shape: Shape, beside_torch: bool
) -> dict[str, Any]:
    """Returns the error of a kernel and its times, and the time of torch's path if it is asked."""
    given = inputs_of_kernels(tokens, shape)
    wide = {name: one.double() for name, one in vars(given).items()}
    with switched(has_kernels=lambda x: False):
        exact = case.call(SimpleNamespace(**wide), ())
    pairs = zip(case.call(given, form), exact, strict=True)
    errors = torch.stack([(one - other).abs().max() / other.abs().max() for one, other in pairs])
    del wide, exact, pairs
    us = timed(lambda: case.call(given, form))
    moved = case.moved * tokens * shape.dtype.itemsize
    line = {"error": f"{errors.max().item():.1e}"}
    found = (statistics.median(us), min(us), max(us))
    line |= {n: round(one, 1) for n, one in zip(("us", "lowest", "highest"), found, strict=True)}
    line["gb_per_s"] = round(moved / line["us"] / 1e3) if moved else ""
    if beside_torch:
        with switched(has_kernels=lambda x: False):
            line["torch_us"] = round(statistics.median(timed(lambda: case.call(given, ()))), 1)
    return line


def timed(call: Callable[[], object]) -> list[float]:
    """Returns the microseconds of calls on a GPU, its cache emptied before each."""
    from triton.testing import do_bench

    return [1e3 * one for one in do_bench(call, warmup=20, rep=60, return_mode="all")]


def inputs_of_kernels(tokens: int, shape: Shape) -> SimpleNamespace:
    """Returns random inputs of an MLP's operations, and room for what kernels write."""
    torch.manual_seed(0)
    hidden, mlp, heads, key_heads, rank, device, dtype = shape
    size = hidden // heads
    sizes = {"y": 2 * mlp, "x": hidden, "h": RANKS, "into": mlp}
    sizes |= {"gradient": hidden, "act": mlp + RANKS, "into_y": 2 * mlp + RANKS}
    sizes |= {"q": hidden, "k": key_heads * size, "v": key_heads * size}
    sizes["beside"] = sizes["q"] + 2 * sizes["k"] + RANKS
    g = {
        name: torch.randn(tokens, size, device=device, dtype=dtype) for name, size in sizes.items()
    }
    g["joined"] = torch.randn(2 * mlp + RANKS, hidden + RANKS, device=device, dtype=dtype)
    g["down"] = torch.randn(hidden + RANKS, mlp + RANKS, device=device, dtype=dtype)
    g["joined"] /= hidden**0.5
    g["down"] /= mlp**0.5
    g["down"][hidden + rank :] = 0
    g["joined"][:mlp, hidden + rank :] = 0
    g["joined"][mlp:, hidden : hidden + rank] = 0
    g["joined"][mlp:, hidden + 2 * rank :] = 0
    g["into_y"] = g["into_y"][:, : 2 * mlp]
    return SimpleNamespace(**g)


def cases(shape: Shape) -> dict[str, Case]:
    """Returns what is timed of a fused MLP, and the gradients of q, k and v side by side."""
    from sftlab.fastpath import mlp_kernel

    hidden, mlp, r = shape.hidden, shape.mlp, shape.rank
    of_both, of_down = Form([mlp, mlp], [1.0, 1.0], False), Form([hidden], [1.0], False)

    def gated(g: SimpleNamespace, form: tuple) -> list[torch.Tensor]:
        act = g.act[:, :mlp]
        mlp_kernel.gated(g.y, False, act, form) if form else mlp_ops.gated(g.y, False, act)
        return [act]

    def backward(g: SimpleNamespace, form: tuple) -> list[torch.Tensor]:
        if form:
            mlp_kernel.gated_backward_(g.into, g.y, False, g.into_y, form)
        else:
            mlp_ops.gated_backward_(g.into, g.y, False, g.into_y)
        return [g.into_y, g.into]

    def beside(g: SimpleNamespace, form: tuple) -> list[torch.Tensor]:
        if not form:
            return [mlp_ops.beside([g.q, g.k, g.v], g.beside.shape[1])]
        mlp_kernel.beside([g.q, g.k, g.v], g.beside, form)
        return [g.beside]

    def down(g: SimpleNamespace, form: tuple) -> list[torch.Tensor]:
        wide, a = for_outputs(of_down, [g.down])
        found, h = mlp_ops.gated_down(g.y, wide, a[:, :mlp], r, False)
        return [found, h[:, :r]]

    def whole(g: SimpleNamespace, form: tuple) -> list[torch.Tensor]:
        (tall, b), (tall_down, b_down) = (
            for_gradients(form, [held], g.y)
            for form, held in ((of_both, g.joined), (of_down, g.down))
        )
        of = g.gradient, g.y, g.x, g.h, tall, b[: 2 * mlp], tall_down, b_down[:hidden]
        x, a, b, a_down = mlp_ops.gated_backward(*of, r, r, False)
        return [x, a, b[:mlp, :r], b[mlp:, r : 2 * r], a_down[:r]]

    size = hidden // shape.heads * (shape.heads + 2 * shape.key_heads)
    return {
        "copy of y (torch)": Case(lambda g, form: [g.y.clone()], ((),), 4 * mlp),
        "gated": Case(gated, (mlp_kernel.TILE,), 3 * mlp, ROWS),
        "gated_backward_": Case(backward, (mlp_kernel.TILE,), 6 * mlp, ROWS),
        "beside": Case(beside, (mlp_kernel.COPIED,), 2 * size + RANKS, COPIES),
        "gated_down": Case(down, ((),)),
        "gated_backward": Case(whole, ((),)),
    }


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
