"""How long does it take to give 4-bit weights back, and a linear's products with them?

python benchmarks/four_bit_weights.py [--sweep] [--tokens 1260] [--seconds 90] \
    [--out results/four_bit_weights]

The linears of Llama-2-7B, in nf4 with nested scales, in bf16 on one GPU. A line for each size: this
project's kernel beside bitsandbytes' operations; the same in float8, in either order (bitsandbytes'
column is bf16 there too); and the forward and backward of the linear with either, in bf16 and in
float8. `equal` says whether all weights, or outputs and gradients, are bitsandbytes' to the last
bit, in float8 those of plain torch; of float8's products `apart` says how far outputs are from
bitsandbytes', of their norm. `us` and `bitsandbytes_us` are of the GPU, its cache emptied before
each call; `host_us` and `bitsandbytes_host_us` are what Python takes to start a call, without
waiting. `gb_per_s` counts what must be read and written once. `form` is how the kernel is launched:
four_bit_kernel.py says what its numbers mean. With --sweep it has other forms too, and products are
left out.

What fails says why as `note`, and SFTLAB_TRACEBACK=1 prints where. At --seconds it ends with what
there is. The table is weights.csv, or sweep.csv, and is written after every line.
"""

import argparse
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit

from sftlab.exit_messages import mistakes_in_one_line
from sftlab.fastpath import four_bit_float8 as four_bit_float8_product
from sftlab.fastpath import four_bit_linear
from sftlab.fastpath.float8 import FORWARD
from sftlab.fastpath.four_bit_float8_weight import float8_scale, four_bit_float8, plainly
from sftlab.fastpath.four_bit_weight import four_bit_weight, table_of
from sftlab.paths import ROOT
from sftlab.runs.environment import provenance, typed_command
from sftlab.script_options import Options
from sftlab.tables import preview, write_csv

NO_TIME = "no time was left"
# forms that a sweep tries: words of a program, and warps
FORMS = ((128, 2), (256, 2), (256, 4), (512, 4), (512, 8), (1024, 4), (1024, 8), (2048, 8))
# of tiles that are transposed: rows, words of each, and warps
TILES = (
    *((64, 8, 4), (64, 16, 4), (64, 16, 8), (64, 32, 8)),
    *((128, 8, 4), (128, 8, 8), (128, 16, 4), (128, 16, 8), (256, 8, 8), (256, 16, 8)),
)
WEIGHTS, FLOAT8, TRANSPOSED = "weights", "weights in float8", "weights in float8, transposed"
PRODUCTS, FLOAT8_PRODUCTS = "products", "products in float8"


class Sizes(NamedTuple):
    """Rows and columns of a weight, by the linears that have them, and where it computes."""

    linears: str
    rows: int
    columns: int
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16


SIZES = (
    Sizes("q_proj k_proj v_proj o_proj", 4096, 4096),
    Sizes("gate_proj up_proj", 11008, 4096),
    Sizes("down_proj", 4096, 11008),
)


def main(argv: list[str] | None = None, sizes: tuple[Sizes, ...] = SIZES) -> None:
    """Time what is there, and write a line for each."""
    options = parse_options(argv)
    if sizes == SIZES and not torch.cuda.is_available():
        raise ValueError("this needs a GPU that runs the kernel, and there is none")
    options.out.mkdir(parents=True, exist_ok=True)
    about, lines = provenance() | {"command": options.command}, []
    for line in measured(options, sizes):
        lines.append(line | about)
        write_csv(options.out / f"{'sweep' if options.sweep else 'weights'}.csv", lines)
        print(shown(line), flush=True)


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Returns the command line, and when the time is over."""
    began, parser = time.monotonic(), Options(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="the kernel in other forms")
    parser.add_argument("--tokens", type=int, default=1260, help="of a step (default: 1260)")
    parser.add_argument("--seconds", type=float, default=90, help="when to end (default: 90)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "four_bit_weights")
    options = parser.parse_args(argv)
    if options.tokens < 1:
        parser.error(f"--tokens {options.tokens}: expected a number of at least 1")
    options.command = typed_command("benchmarks/four_bit_weights.py", argv or sys.argv[1:])
    options.end = began + options.seconds
    return options


def shown(line: dict[str, Any]) -> str:
    """Returns a line for a reader."""
    what = f"{line['what']} of {line['linears']} [{line['rows']}, {line['columns']}]"
    if line["form"]:
        what += f" ({line['form']})"
    if line["note"]:
        return f"{what}: {line['note']}"
    speed = f", {line['gb_per_s']} GB/s" if line.get("gb_per_s") else ""
    near = f"apart: {line['apart']}" if "apart" in line else f"equal: {line['equal']}"
    return (
        f"{what}: {line['us']} us{speed}, bitsandbytes {line['bitsandbytes_us']}; to start "
        f"{line['host_us']} us, bitsandbytes {line['bitsandbytes_host_us']}; {near}"
    )


def measured(options: argparse.Namespace, sizes: tuple[Sizes, ...]) -> Iterator[dict[str, Any]]:
    """Yields a line for each size and form, and for each size's products."""
    for size in sizes:
        if options.sweep:
            cases = [(what, form) for what in (WEIGHTS, FLOAT8) for form in FORMS]
            cases += [(TRANSPOSED, form) for form in TILES]
        else:
            whats = WEIGHTS, FLOAT8, TRANSPOSED, PRODUCTS, FLOAT8_PRODUCTS
            cases = [(what, None) for what in whats]
        for what, form in cases:
            line = {"what": what, "form": " ".join(map(str, form or ())), "note": ""}
            line |= {"linears": size.linears, "rows": size.rows, "columns": size.columns}
            if time.monotonic() > options.end:
                yield line | {"note": NO_TIME}
                return
            try:
                line |= timed_case(size, what, form, options.tokens)
            except Exception as error:  # a failure costs its own line alone
                if os.environ.get("SFTLAB_TRACEBACK") == "1":
                    traceback.print_exc()
                line["note"] = preview(f"{type(error).__name__}: {error}", 300)
            yield line


def timed_case(size: Sizes, what: str, form: tuple | None, tokens: int) -> dict[str, Any]:
    """Returns what a line measures."""
    torch.manual_seed(0)  # once: equal draws of a weight and its input would be equal rows
    if what in (PRODUCTS, FLOAT8_PRODUCTS):
        return products(size, tokens, float8=what == FLOAT8_PRODUCTS)
    if what == WEIGHTS:
        return weights(size, form)
    return float8_weights(size, form, transposed=what == TRANSPOSED)


def weights(size: Sizes, form: tuple[int, int] | None) -> dict[str, Any]:
    """Returns what giving a weight back takes, as the operation or by the kernel in a form."""
    weight = drawn(size, size.rows)
    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    nested = (state.state2.code, state.state2.absmax, state.offset)

    def ours() -> torch.Tensor:
        if form is None:
            of = state.blocksize, state.quant_type, *state.shape, state.dtype
            return four_bit_weight(packed, state.absmax, *nested, *of)
        from sftlab.fastpath.four_bit_kernel import fill_four_bit_weight

        table = table_of(state.quant_type, packed.device)
        fill_four_bit_weight(packed, state.absmax, nested, table, state.blocksize, weight, form)
        return weight

    line = beside_bitsandbytes(ours, lambda: dequantize_4bit(packed, state))
    line["equal"] = torch.equal(ours(), dequantize_4bit(packed, state))
    moved = weight.nbytes + packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    return line | {"gb_per_s": round(moved / line["us"] / 1e3)}


def float8_weights(size: Sizes, form: tuple | None, transposed: bool) -> dict[str, Any]:
    """Returns what giving a weight back in float8 takes, as `weights` does."""
    weight = drawn(size, size.rows)
    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    nested = (state.state2.code, state.state2.absmax, state.offset)
    scale = float8_scale(state.absmax, nested, "nf4")
    of, shape = (packed, state.absmax), (size.rows, size.columns)
    kernel_out = torch.empty(shape[::-1] if transposed else shape, device=packed.device)
    kernel_out = kernel_out.to(FORWARD)

    def ours() -> torch.Tensor:
        if form is None:
            stored = state.blocksize, state.quant_type, *shape
            return four_bit_float8(*of, *nested, *stored, scale, transposed)
        from sftlab.fastpath.four_bit_kernel import fill_four_bit_float8

        how = table_of("nf4", packed.device), state.blocksize, scale, transposed
        fill_four_bit_float8(*of, nested, *how, kernel_out, form)
        return kernel_out

    line = beside_bitsandbytes(ours, lambda: dequantize_4bit(packed, state))
    right = plainly(*of, nested, state.blocksize, "nf4", shape, scale, transposed)
    line["equal"] = torch.equal(ours().bfloat16(), right.bfloat16())
    moved = right.nbytes + packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    return line | {"gb_per_s": round(moved / line["us"] / 1e3)}


def products(size: Sizes, tokens: int, float8: bool) -> dict[str, Any]:
    """Returns what a linear's forward and backward take, with either way to its weight."""
    of = {"bias": False, "compute_dtype": size.dtype, "quant_type": "nf4", "device": size.device}
    layer = Linear4bit(size.columns, size.rows, **of)
    layer.weight.data = drawn(size, size.rows)
    layer.to(size.device)  # which rounds it to 4 bits
    product = four_bit_float8_product if float8 else four_bit_linear
    if reason := product.why_not(layer, size.dtype):
        raise ValueError(reason)
    x, gradient = drawn(size, tokens).requires_grad_(), drawn(size, tokens, size.rows)
    product.take(layer.train())
    taken = type(layer)

    def call(of: type[Linear4bit]) -> list[torch.Tensor]:
        y = of.forward(layer, x)
        return [y, *torch.autograd.grad(y, x, gradient)]

    def ours() -> list[torch.Tensor]:
        return call(taken)

    def bitsandbytes() -> list[torch.Tensor]:
        return call(Linear4bit)

    line = beside_bitsandbytes(ours, bitsandbytes) | {"tokens": tokens}
    found, right = ours(), bitsandbytes()
    if float8:
        apart = (found[0] - right[0]).float().norm() / right[0].float().norm()
        return line | {"apart": round(apart.item(), 4)}
    return line | {"equal": all(torch.equal(*pair) for pair in zip(found, right, strict=True))}


def drawn(size: Sizes, rows: int, columns: int | None = None) -> torch.Tensor:
    """Returns random numbers [rows, columns], `size`'s columns unless said."""
    shape = rows, columns or size.columns
    return torch.randn(shape, device=size.device, dtype=size.dtype) * 0.02


def beside_bitsandbytes(
    ours: Callable[[], object], bitsandbytes: Callable[[], object]
) -> dict[str, float]:
    """Returns the microseconds of both, of the GPU and of Python alone."""
    line = {}
    for name, call in (("", ours), ("bitsandbytes_", bitsandbytes)):
        us = timed(call)
        line |= {f"{name}us": round(statistics.median(us), 1), f"{name}lowest": round(min(us), 1)}
        line |= {f"{name}highest": round(max(us), 1), f"{name}host_us": round(started(call), 1)}
    return line


def timed(call: Callable[[], object]) -> list[float]:
    """Returns the microseconds of calls on a GPU, its cache emptied before each."""
    from triton.testing import do_bench

    return [1e3 * one for one in do_bench(call, warmup=20, rep=60, return_mode="all")]


def started(call: Callable[[], object], calls: int = 20) -> float:
    """Returns the microseconds in which Python starts a call, the median of five times `calls`.

    So few are started at a time that the GPU's queue does not fill up.
    """
    found = []
    for _ in range(5):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - began) / calls * 1e6)
    return statistics.median(found)


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
