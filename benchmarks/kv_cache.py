"""Generation with and without the KV cache: seconds, tokens/s, peak memory, and equal answers.

python benchmarks/kv_cache.py --model data/demo/base [--dtype float32] [--batches 1 8 16] \
    [--prompts 256 1024] [--outputs 32 128] [--repeats 3] [--out results/kv_cache]

`--model llama3.2-1b` or `llama2-7b` takes a random-initialised model of that shape. Prompts are
random tokens, the same for both. Every answer has exactly the length asked for. Without the cache
every step computes the whole text again. Seconds are the median, lowest and highest of the repeats,
which alternate after one warm-up each. Memory is the peak beyond the weights, from a generation
that is not timed. Published seconds of the 1B model on another GPU stand beside the same cells.

The table is written after every cell. The same command, started again, continues after the last
one.
"""

import contextlib
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sftlab.exit_messages import mistakes_in_one_line
from sftlab.measurement.hardware_limit import synchronize
from sftlab.measurement.memory import peak_beyond
from sftlab.models.random_models import MODEL_SHAPES, make_random_files, random_files
from sftlab.paths import ROOT
from sftlab.runs.environment import provenance
from sftlab.script_options import Options
from sftlab.tables import aligned, read_csv, write_csv

CACHES = {"with": True, "without": False}
# Seconds of the published techniques study (docs/studies.md) on a P100, by cache, batch, prompt and
# output; peaks did not differ by cache there.
PUBLISHED = {
    ("with", 1, 256, 32): 4.54,
    ("without", 1, 256, 32): 11.61,
    ("with", 8, 256, 32): 28.41,
    ("without", 8, 256, 32): 29.16,
    ("with", 16, 256, 32): 52.42,
    ("without", 16, 256, 32): 52.46,
}


def main(argv: list[str]) -> None:
    """Measure every cell, write table and plot, print the table."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", required=True, help=f"a model's folder or name, or {' or '.join(MODEL_SHAPES)}"
    )
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    for name, default in (
        ("batches", [1, 8, 16]),
        ("prompts", [256, 1024]),
        ("outputs", [32, 128]),
    ):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=default)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "kv_cache")
    arguments = parser.parse_args(argv)
    model = load(arguments.model, getattr(torch, arguments.dtype))
    about = {
        "repeats": str(arguments.repeats),
        "model": arguments.model,
        "dtype": arguments.dtype,
        **provenance(),
    }
    table = arguments.out / "kv_cache.csv"
    arguments.out.mkdir(parents=True, exist_ok=True)
    done, lines = earlier(table, about), []
    for prompt, output, batch in product(arguments.prompts, arguments.outputs, arguments.batches):
        known = [
            line
            for line in done
            if (line["batch"], line["prompt"], line["output"]) == (batch, prompt, output)
        ]
        lines += known or cell(model, batch, prompt, output, arguments.repeats)
        write_csv(table, [line | about for line in lines])
        slower = f"without the cache {lines[-1]['times_as_long']} times as long"
        before = "; done before" if known else ""
        print(f"batch {batch}, {prompt} + {output} tokens: {slower}{before}", flush=True)
    drawing = [sys.executable, "benchmarks/draw.py", str(arguments.out.resolve())]
    subprocess.run(drawing, cwd=ROOT, check=True)
    print(aligned([list(lines[0]), *([str(value) for value in line.values()] for line in lines)]))


def earlier(path: Path, about: dict[str, str]) -> list[dict[str, Any]]:
    """Returns the rows of a table that were measured with this model, machine and versions."""
    rows = [row for row in read_csv(path) if about.items() <= row.items()]
    return [
        {name: number(value) for name, value in row.items() if name not in about} for row in rows
    ]


def number(text: str) -> float | str:
    """Returns a cell of a table as a number where it is one."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def load(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """Returns the model, on the GPU if there is one."""
    if name in MODEL_SHAPES:
        make_random_files(name, longest=512)
        name = str(random_files(name, longest=512)[0])
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def cell(
    model: PreTrainedModel, batch: int, prompt: int, output: int, repeats: int
) -> list[dict[str, Any]]:
    """Returns a row with the cache and a row without."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), generator=generator).to(
        model.device
    )
    seconds: dict[str, list[float]] = {name: [] for name in CACHES}
    answers = {name: generate(model, ids, output, cache) for name, cache in CACHES.items()}
    for _ in range(repeats):
        for name, cache in CACHES.items():
            started = time.perf_counter()
            generate(model, ids, output, cache)
            synchronize()
            seconds[name].append(time.perf_counter() - started)
    same = (answers["with"] == answers["without"]).all(dim=1).sum().item()
    # the last token of an answer is never read again
    cache_mb = round(cache_bytes(model, batch, prompt + output - 1) / 2**20, 2)
    published = published_of(model)
    lines = []
    for name, cache in CACHES.items():
        middle = statistics.median(seconds[name])
        peak = peak_beyond(lambda cache=cache: generate(model, ids, output, cache))
        lines.append(
            {
                "cache": name,
                "batch": batch,
                "prompt": prompt,
                "output": output,
                "seconds": round(middle, 4),
                "lowest": round(min(seconds[name]), 4),
                "highest": round(max(seconds[name]), 4),
                "tokens_per_s": round(batch * output / middle, 1),
                "peak_mb": round(peak / 2**20, 2),
                "cache_mb": cache_mb if cache else 0.0,
                "times_as_long": round(middle / statistics.median(seconds["with"]), 2),
                "same_answers": f"{same} of {batch}",
                "published_seconds": PUBLISHED.get((name, batch, prompt, output), "")
                if published
                else "",
            }
        )
    return lines


@torch.no_grad()
def generate(model: PreTrainedModel, ids: torch.Tensor, output: int, cache: bool) -> torch.Tensor:
    """Returns greedy answers of exactly `output` tokens, [batch, output]."""
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        use_cache=cache,
        max_new_tokens=output,
        min_new_tokens=output,
        pad_token_id=0,
    )
    return found[:, ids.shape[1] :]


def published_of(model: PreTrainedModel) -> bool:
    """Returns whether the model has the shape of the published techniques study."""
    return all(
        getattr(model.config, name) == value
        for name, value in MODEL_SHAPES["llama3.2-1b"].items()
        if "size" in name
    )


def cache_bytes(model: PreTrainedModel, batch: int, tokens: int) -> int:
    """Returns the bytes of the keys and values of `tokens` tokens in each of `batch` rows."""
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        2
        * config.num_hidden_layers
        * config.num_key_value_heads
        * size
        * tokens
        * batch
        * model.dtype.itemsize
    )


if __name__ == "__main__":
    with mistakes_in_one_line():
        main(sys.argv[1:])
