"""How fast a judge of 7 billion parameters answers and judges on a GPU, and its memory.

python benchmarks/judge_speed.py [--what answers judgements] [--rehearse] \
    [--out results/judge_speed]

A random-initialised model of Mistral-7B's shape (that of Prometheus 2) runs the code of
eval/alpaca.py and eval/mt_bench.py, in batches and one prompt at a time. Prompts have AlpacaEval's
lengths: 40 tokens for an answer, and 1,000 in the mean for a judgement, which holds two answers.
Such a model never ends a text, so each has all 256 tokens. Every cell is warmed up by a batch. Rows
of what is not measured now stay in the table. `--rehearse` takes a tiny shape and few tokens, to
try the script on a CPU.
"""

import gc
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoTokenizer

from sftlab.data.chat_template import set_template
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.judging.judge_formats import Messages
from sftlab.judging.judges import LocalJudge
from sftlab.models.random_models import MODEL_SHAPES, save_random_model
from sftlab.paths import ROOT
from sftlab.runs.environment import provenance
from sftlab.script_options import Options
from sftlab.tables import read_csv, write_csv

TINY = {
    "vocab_size": 1000,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "bos_token_id": 998,
    "eos_token_id": 998,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


class Cell(NamedTuple):
    """Answers or judgements in batches of a size; compiled decoding and 4 bits are optional."""

    what: str
    batch: int
    batches: int
    compiled: bool = False
    in_4bit: bool = False


CELLS = [
    Cell("answers", 1, 4),
    Cell("answers", 64, 3),
    Cell("answers", 64, 3, compiled=True),
    Cell("judgements", 1, 4),
    Cell("judgements", 16, 3),
    Cell("judgements", 64, 3),
    Cell("judgements", 64, 3, compiled=True),
    Cell("judgements", 64, 2, in_4bit=True),
]


def main() -> None:
    """Make the model, measure a cell at a time, write a row as each ends."""
    parser = Options(description=__doc__.splitlines()[0])
    kinds = ["answers", "judgements"]
    parser.add_argument("--what", nargs="+", choices=kinds, default=kinds, help="what is measured")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "judge_speed")
    parser.add_argument(
        "--rehearse", action="store_true", help="a tiny shape and few tokens, for a CPU"
    )
    arguments = parser.parse_args()
    shape, new_tokens = ("tiny", 16) if arguments.rehearse else ("mistral-7b", 256)
    if arguments.rehearse:
        MODEL_SHAPES["tiny"] = TINY
    folder = make_judge(shape)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path, lines = arguments.out / "judge_speed.csv", []
    kept = [one for one in read_csv(path) if one["what"] not in arguments.what]
    for cell in CELLS:
        if cell.what not in arguments.what or (cell.in_4bit and not torch.cuda.is_available()):
            continue
        line = measure(cell, folder, new_tokens)
        single = next((one for one in lines if one["what"] == cell.what), line)
        line["times_one_at_a_time"] = round(line["rows_per_s"] / single["rows_per_s"], 2)
        lines.append(
            {"shape": shape, **line, **provenance(), "command": "python benchmarks/judge_speed.py"}
        )
        print({k: v for k, v in lines[-1].items() if k not in ("versions", "command")}, flush=True)
        write_csv(path, kept + lines)


def make_judge(shape: str) -> Path:
    """Make a random-initialised model with a tokenizer of words and a chat template.

    Returns its folder.
    """
    folder = ROOT / "data" / f"{shape}-judge"
    save_random_model(folder, shape=shape)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    set_template(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def prompts(what: str, count: int, seed: int = 0) -> list[Messages]:
    """Returns conversations of random words of one token each.

    The longest come first, as in the evaluations.
    """
    generator = np.random.default_rng(seed)
    mean = 40 if what == "answers" else 1000
    lengths = np.clip(generator.lognormal(np.log(mean) - 0.08, 0.4, count), 10, 3000).astype(int)
    texts = [
        " ".join(f"w{i}" for i in generator.integers(0, 900, length))
        for length in sorted(lengths)[::-1]
    ]
    return [[{"role": "user", "content": text}] for text in texts]


def measure(cell: Cell, folder: Path, new_tokens: int) -> dict[str, Any]:
    """Returns rows/s over whole batches after a warm-up batch, and the peak GB (2**30 bytes)."""
    gpu = torch.cuda.is_available()
    judge = LocalJudge(str(folder), new_tokens, cell.in_4bit, cell.batch)
    judge.many = cell.compiled
    asked = prompts(cell.what, cell.batch * cell.batches)
    parts = [asked[i :: cell.batches] for i in range(cell.batches)]
    started = time.perf_counter()
    judge.answers(parts[0])
    first = time.perf_counter() - started
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    started = time.perf_counter()
    found = [answer for part in parts for answer in judge.answers(part)]
    took = time.perf_counter() - started
    line = {
        **cell._asdict(),
        "rows": len(found),
        "prompt_tokens": round(float(np.mean([judge.size(one) for one in asked]))),
        "new_tokens": round(float(np.mean([one.tokens for one in found]))),
        "rows_per_s": round(len(found) / took, 3),
        "tokens_per_s": round(sum(one.tokens for one in found) / took),
        "first_batch_s_with_loading": round(first, 1),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpu else None,
    }
    del judge
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
    return line


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
