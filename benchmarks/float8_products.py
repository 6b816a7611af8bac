"""How much faster is a product in float8, and what does rounding its input take?

python benchmarks/float8_products.py [--tokens 20253] [--out results/float8_products]

The linears of Llama-3.2-1B's shape on one GPU. A line for each size and direction: the product in
bf16, in float8 with one scale for all of the input, and with one for each token (`by row`). Inputs
are e4m3 forwards and e5m2 backwards. Lines of `rounding` are the RMS norm of the input, compiled:
alone, and with its result in float8 as well. Lines of `head` are of a chunk of the fused loss: the
logits, their loss with its slopes, and the gradient of the hidden states, whose sums run over all
words: in float8 with rough sums and with exact ones. `apart` is how far that gradient is from the
one of the same slopes in float32, as a share of its norm. `us` is the median, the GPU's cache
emptied before each call. What fails says why as `note`. The table is products.csv.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sftlab.exit_messages import first_line, mistakes_in_one_line
from sftlab.fastpath.float8 import BACKWARD, FORWARD, float8_product, to_float8
from sftlab.fastpath.fused_loss import CHUNK, cross_entropy_, in_float8
from sftlab.paths import ROOT
from sftlab.runs.environment import provenance, typed_command
from sftlab.script_options import Options
from sftlab.tables import write_csv

# inputs and outputs of the linears, by their names
SIZES = {
    "q_proj o_proj": (2048, 2048),
    "k_proj v_proj": (2048, 512),
    "gate_proj up_proj": (2048, 8192),
    "down_proj": (8192, 2048),
}
HIDDEN = 2048
WORDS = 128256


def main(argv: list[str] | None = None) -> None:
    """Time every product, and write a line for each."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=20253, help="of a step (default: 20253)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "float8_products")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise ValueError("this needs a GPU that multiplies in float8, and there is none")
    options.out.mkdir(parents=True, exist_ok=True)
    about = provenance() | {
        "command": typed_command("benchmarks/float8_products.py", argv or sys.argv[1:])
    }
    lines = []
    for line, call in (*products(options), *roundings(options), *head()):
        try:
            line["us"] = round(microseconds(call), 1)
        except RuntimeError as error:
            line["note"] = first_line(error)
        lines.append(line | about)
        write_csv(options.out / "products.csv", lines)
        print(*(line[name] for name in ("what", "linears", "direction", "how")), end=": ")
        print(f"{line['us']} us" if line["us"] else line["note"], flush=True)


def line_of(what: str, linears: str, direction: str, how: str) -> dict[str, Any]:
    """Returns a line that has no time yet."""
    return {"what": what, "linears": linears, "direction": direction, "how": how} | {
        "us": "",
        "apart": "",
        "note": "",
    }


def products(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Callable]]:
    """Yields the products of every linear, of its input and of its gradient."""
    for linears, (inputs, outputs) in SIZES.items():
        for direction, k, n, dtype in (
            ("forward", inputs, outputs, FORWARD),
            ("backward", outputs, inputs, BACKWARD),
        ):
            x, weight = drawn(options.tokens, k), drawn(n, k)
            bf16 = partial(torch.mm, x, weight.t())
            yield line_of("product", linears, direction, "bf16"), bf16
            rounded, scale = to_float8(weight, FORWARD)
            for by_row in (False, True):
                small, own = to_float8(x, dtype, by_row)
                scales = own, scale.repeat(1, n) if by_row else scale
                operands = small, rounded.t(), *scales
                kept = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
                how = "float8 by row" if by_row else "float8 by tensor"
                product = partial(torch._scaled_mm, *operands, **kept)
                yield line_of("product", linears, direction, how), product


def roundings(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Callable]]:
    """Yields an RMS norm alone, and with its result rounded in either way."""
    x = drawn(options.tokens, HIDDEN)
    weight = drawn(1, HIDDEN)[0]

    def norm() -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
        return weight * (wide * scale).to(x.dtype)

    def rounded(by_row: bool) -> tuple[torch.Tensor, ...]:
        y = norm()
        return y, *to_float8(y, FORWARD, by_row)

    for how, call in (
        ("norm alone", norm),
        ("norm, float8 by tensor", lambda: rounded(False)),
        ("norm, float8 by row", lambda: rounded(True)),
    ):
        yield line_of("rounding", "", "forward", how), torch.compile(call)


def head() -> Iterator[tuple[dict[str, Any], Callable]]:
    """Yields what the loss of a chunk takes, with slopes of its logits in bf16 and in float8."""
    hidden, weight = drawn(CHUNK, HIDDEN) * 10, drawn(WORDS, HIDDEN)
    targets = torch.randint(0, WORDS, (CHUNK,), device="cuda")
    figures = [torch.empty(CHUNK, device="cuda") for _ in range(3)]
    logits = hidden @ weight.t()
    line = partial(line_of, "head", "lm_head")
    yield line("forward", "logits in bf16"), partial(torch.mm, hidden, weight.t())
    exact = torch.softmax(logits.float(), -1)
    exact[torch.arange(CHUNK), targets] -= 1
    exact = exact @ weight.float()
    slopes = logits.clone()
    loss = partial(cross_entropy_, targets=targets, nats=figures[0], entropies=figures[1])
    loss(slopes, hits=figures[2])
    call = partial(torch.mm, slopes, weight)
    yield line("backward", "bf16") | {"apart": apart(call(), exact)}, call
    room = torch.empty_like(logits, dtype=BACKWARD), torch.empty(CHUNK, 1, device="cuda")
    loss(logits, hits=figures[2], slopes=room)
    for how, rough in (("float8, rough sums", True), ("float8, exact sums", False)):
        call = partial(float8_product, *room, *in_float8(weight), rough)
        yield line("backward", how) | {"apart": apart(call(), exact)}, call
    yield line("loss", "slopes in bf16"), partial(loss, slopes, hits=figures[2])
    yield line("loss", "slopes in float8"), partial(loss, logits, hits=figures[2], slopes=room)


def apart(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Returns the norm of the difference, as a share of the norm of `exact`."""
    return round(((found.float() - exact).norm() / exact.norm()).item(), 5)


def drawn(rows: int, columns: int) -> torch.Tensor:
    """Returns random numbers [rows, columns] in bf16."""
    return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * 0.1


def microseconds(call: Callable[[], object]) -> float:
    """Returns the median time of a call on the GPU."""
    from triton.testing import do_bench

    return 1e3 * statistics.median(do_bench(call, warmup=20, rep=50, return_mode="all"))


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
