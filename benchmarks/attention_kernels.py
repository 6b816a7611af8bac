"""How long does attention over packed rows take, with tiles of either size and in torch's kernels?

python benchmarks/attention_kernels.py [--shapes NAME ...] [--rounds 7] \
    [--out results/attention_kernels]

Causal attention in bf16 on one GPU. A line for each shape, direction and kernels: those of this
project with tiles of 64 and of 128 tokens (`chosen` is what a run over such rows takes), torch's
FlashAttention-2, and cuDNN's where rows are alike, which takes no others. All are run in turn.
`us` is the median of the rounds, a round being the mean of ten calls in a row; `us_from` and
`us_to` are the fastest and the slowest round. The backward is of queries, keys and values together.
What fails says why as `note`. The table is attention.csv.
"""

import inspect
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sftlab.data.tiles import LONG_TILE, TILE, tile_for, tiles
from sftlab.exit_messages import first_line, mistakes_in_one_line
from sftlab.paths import ROOT
from sftlab.runs.environment import provenance, typed_command
from sftlab.script_options import Options
from sftlab.tables import write_csv

CALLS = 10
TOKENS_MULTIPLE = 128  # as in sftlab/data/collator.py, which needs other libraries
TORCH = {"FlashAttention-2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


class Shape(NamedTuple):
    """Heads of queries, heads of keys and values, elements of a head, and the tokens of rows."""

    heads: int
    key_heads: int
    size: int
    lengths: tuple[int, ...]


def drawn(count: int, shortest: int, longest: int) -> tuple[int, ...]:
    """Returns the lengths of so many rows, the same ones every time.

    Another row fills them up to a multiple of 128 tokens, as it does in a batch.
    """
    found = np.random.default_rng(0).integers(shortest, longest + 1, count).tolist()
    return (*found, -sum(found) % TOKENS_MULTIPLE)


SHORT = drawn(64, 120, 512)
SHAPES = {
    "long_128": Shape(32, 8, 128, (4096,) * 2),
    "long_64": Shape(32, 8, 64, (4096,) * 4),
    "middle_128": Shape(32, 32, 128, drawn(24, 300, 1024)),
    "short_64": Shape(32, 8, 64, SHORT),
    "short_128": Shape(32, 8, 128, SHORT),
}
# a forward, and a backward after it, of one kind of kernels
Calls = dict[str, Callable[[], object]]


def main(argv: list[str] | None = None) -> None:
    """Time every shape, and write a line for each direction and kind of kernels."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=7, help="of every kind in turn (default: 7)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "attention_kernels")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise ValueError("this needs a GPU, and there is none")
    options.out.mkdir(parents=True, exist_ok=True)
    about = provenance(["triton"]) | {
        "command": typed_command("benchmarks/attention_kernels.py", argv or sys.argv[1:])
    }
    lines = []
    for name in options.shapes:
        for line in timed(SHAPES[name], options.rounds):
            lines.append({"shape": name} | line | about)
            print(name, line["direction"], line["kernels"], sep=", ", end=": ")
            print(f"{line['us']} us" if line["us"] else line["note"], flush=True)
        write_csv(options.out / "attention.csv", lines)


def timed(shape: Shape, rounds: int) -> Iterator[dict[str, Any]]:
    """Yields a line for each direction and kind of kernels over rows of a shape."""
    torch.manual_seed(0)
    ready, notes = {}, {}
    for name, make in kinds(shape).items():
        try:
            ready[name] = make()
            for call in ready[name].values():
                call()  # compiled, and known to work
        except (RuntimeError, ImportError) as error:
            ready.pop(name, None)
            notes[name] = first_line(error)
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for name, calls in ready.items():
            for direction, call in calls.items():
                found.setdefault((direction, name), []).append(microseconds(call))
    lengths = np.array(shape.lengths)
    about = {"heads": shape.heads, "key_heads": shape.key_heads, "head_size": shape.size}
    about |= {"rows": len(lengths), "tokens": int(lengths.sum())}
    chosen = tiled(tile_for(lengths))
    for direction in ("forward", "backward"):
        for name in (*ready, *notes):
            times = found.get((direction, name), [])
            yield about | {
                "direction": direction,
                "kernels": name,
                "chosen": int(name == chosen) if name.startswith("tiles") else "",
                "us": round(statistics.median(times), 1) if times else "",
                "us_from": round(min(times), 1) if times else "",
                "us_to": round(max(times), 1) if times else "",
                "rounds": len(times),
                "note": notes.get(name, ""),
            }


def kinds(shape: Shape) -> dict[str, Callable[[], Calls]]:
    """Returns by name what makes the calls of each kind of kernels, over numbers of its own."""
    found: dict[str, Callable[[], Calls]] = {
        tiled(tile): partial(of_tiles, shape, tile) for tile in (TILE, LONG_TILE)
    }
    if len(set(shape.lengths)) > 1:
        return found | {"FlashAttention-2": partial(of_torch_packed, shape)}
    return found | {name: partial(of_torch, shape, one) for name, one in TORCH.items()}


def tiled(tile: int) -> str:
    """Returns the name of this project's kernels with tiles of so many tokens."""
    return f"tiles of {tile}"


def of_tiles(shape: Shape, tile: int) -> Calls:
    """Returns the calls of this project's kernels. Raises ImportError without Triton."""
    from sftlab.fastpath.triton_kernels import attention_backward, attention_forward

    query, key, value, gradient = numbers(shape)
    table, scale = tiles(shape.lengths, tile).cuda(), shape.size**-0.5
    output, lse = attention_forward(query, key, value, table, scale)
    backward = partial(attention_backward, gradient, query, key, value, output, lse, table, scale)
    return {
        "forward": partial(attention_forward, query, key, value, table, scale),
        "backward": backward,
    }


def of_torch(shape: Shape, backend: SDPBackend) -> Calls:
    """Returns the calls of torch's kernels over rows that are alike, side by side."""
    rows = len(shape.lengths)
    *given, gradient = (
        one.unflatten(0, (rows, -1)).transpose(1, 2).contiguous() for one in numbers(shape)
    )

    def forward(*given: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*given, is_causal=True, enable_gqa=True)

    return with_backward(forward, given, gradient)


def of_torch_packed(shape: Shape) -> Calls:
    """Returns the calls of torch's FlashAttention-2 over packed rows. Raises ImportError."""
    from torch.nn.attention.varlen import varlen_attn

    *given, gradient = numbers(shape)
    starts = torch.tensor([0, *shape.lengths], device="cuda").cumsum(0).int()
    longest, takes = max(shape.lengths), inspect.signature(varlen_attn).parameters
    # what is causal has had two names; grouped heads were once taken without saying so
    causal = {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
    grouped = {"enable_gqa": True} if "enable_gqa" in takes else {}

    def forward(*given: torch.Tensor) -> torch.Tensor:
        return varlen_attn(*given, starts, starts, longest, longest, **causal, **grouped)

    return with_backward(forward, given, gradient)


def with_backward(
    forward: Callable, given: Sequence[torch.Tensor], gradient: torch.Tensor
) -> Calls:
    """Returns the calls of a function, of which autograd knows the backward."""
    leaves = [one.requires_grad_() for one in given]
    output = forward(*leaves)
    return {
        "forward": partial(forward, *leaves),
        "backward": partial(torch.autograd.grad, output, leaves, gradient, retain_graph=True),
    }


def numbers(shape: Shape) -> tuple[torch.Tensor, ...]:
    """Returns random queries, keys, values and gradients of the output, [tokens, heads, size]."""
    heads = (shape.heads, shape.key_heads, shape.key_heads, shape.heads)
    return tuple(
        torch.randn(sum(shape.lengths), one, shape.size, device="cuda", dtype=torch.bfloat16)
        for one in heads
    )


def microseconds(call: Callable[[], object]) -> float:
    """Returns the mean time of a call on the GPU, of ten in a row after another."""
    call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / CALLS


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
