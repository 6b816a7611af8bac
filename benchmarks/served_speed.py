"""How fast do a vLLM server, the own generator and transformers' continuous batching answer?

python app/serve.py --run RUN -- --enforce-eager                  (in another terminal)
OMP_NUM_THREADS=1 python benchmarks/served_speed.py --run RUN --server http://127.0.0.1:8000/v1 \
    [--rows 64] [--max_new_tokens 64] [--batch_size 32] [--requests 64] [--rounds 3]

The three answer the same held-out prompts of a run as tuned, greedily, in turns. The table has a
row for each: tokens a second (median over the rounds, and each round's), and how many answers are
those of the own generator. On a CPU, vLLM keeps one core for its HTTP server and computes on the
others: give this script as many threads.
"""

import os

# GNU OpenMP threads spin while they wait, which on busy cores costs several times the work itself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig

from sftlab.evaluation.base_and_tuned import finished_run, load_pair, run_tokenizer
from sftlab.evaluation.generation import Generator, Sampling, longest_prompt, turn_of
from sftlab.evaluation.held_out import held_out, select
from sftlab.evaluation.served_answers import WORDS, Asking, ServedModels, asked_together
from sftlab.evaluation.server_client import ServerClient
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.export.server_agreement import LoadedRun, hold_side
from sftlab.models.inner_model import inner_model
from sftlab.paths import ROOT
from sftlab.runs.environment import provenance
from sftlab.script_options import Options
from sftlab.tables import aligned, write_csv

# the answers' texts and their tokens, in the order of the prompts
Answered = tuple[list[str], int]
SHOWN = ("who", "rows", "tokens", "tokens_per_s", "ratio_to_own", "answers_of_own")


def main(argv: list[str]) -> None:
    """Let the three answer in turns, and write a row for each."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path, help="a finished run's directory")
    parser.add_argument("--server", required=True, metavar="URL", help="app/serve.py of that run")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=32, help="of the own generator")
    parser.add_argument("--requests", type=int, default=64, help="under way at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "served_speed")
    arguments = parser.parse_args(argv)
    run = finished_run(arguments.run)
    tokenizer, model = run_tokenizer(arguments.run, run), load_pair(arguments.run, run)
    pair = LoadedRun(run, model, tokenizer)
    names = {"base": "base", "tuned": "tuned"}
    served = ServedModels(ServerClient(arguments.server, WORDS), names, arguments.requests)
    hold_side(served, pair, "tuned")
    sampling = Sampling(arguments.max_new_tokens)
    longest = longest_prompt(model.config, sampling)
    rows = select(held_out(run), arguments.rows, tokenizer, run["recipe"]["max_length"], longest)
    prompts = sorted(rows.prompts, key=len, reverse=True)
    ways: dict[str, Callable[[], Answered]] = {
        "own generator": lambda: own(pair, prompts, sampling, arguments.batch_size),
        "generate_batch of transformers": lambda: batched(pair, prompts, sampling),
        "vLLM server": lambda: from_server(served, pair, prompts, sampling),
    }
    measured = in_turns(ways, arguments.rounds)
    lines = table(arguments, run["recipe"], prompts, measured)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.out / "served_speed.csv", lines)
    print(aligned([list(SHOWN), *([str(line[name]) for name in SHOWN] for line in lines)]))


def own(pair: LoadedRun, prompts: list[list[int]], sampling: Sampling, size: int) -> Answered:
    """Returns what the generator of the evaluations answers, batch by batch."""
    generator = Generator(pair.model, pair.tokenizer, sampling)
    parts = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    found = [one for part in parts for one in generator.answers(part)]
    return [one.text for one in found], sum(one.tokens for one in found)


def batched(pair: LoadedRun, prompts: list[list[int]], sampling: Sampling) -> Answered:
    """Returns what transformers' continuous batching answers."""
    ends = turn_of(pair.model, pair.tokenizer).end_tokens
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, do_sample=False, eos_token_id=ends
    )
    assert isinstance(pair.model, PeftModel)
    found = inner_model(pair.model).generate_batch(prompts, generation_config=config)
    named = {tuple(one.prompt_ids): one.generated_tokens for one in found.values()}
    new = [[token for token in named[tuple(prompt)] if token not in ends] for prompt in prompts]
    texts = pair.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in texts], sum(map(len, new))


def from_server(
    served: ServedModels, pair: LoadedRun, prompts: list[list[int]], sampling: Sampling
) -> Answered:
    """Returns what the server answers, asked for many at once."""
    ask = Asking(served.client, served.names["tuned"], pair.tokenizer, sampling, pair.turn)
    found: dict[int, Any] = {}
    asked_together(served, range(len(prompts)), lambda i: ask(prompts[i], i), found.__setitem__)
    answers = [found[i] for i in range(len(prompts))]
    return [one.text for one in answers], sum(one.tokens for one in answers)


def in_turns(
    ways: dict[str, Callable[[], Answered]], rounds: int
) -> dict[str, list[tuple[float, Answered]]]:
    """Returns the seconds and the answers of each way, a round after the other.

    A first round, which is not measured, warms all of them.
    """
    measured: dict[str, list[tuple[float, Answered]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, answer in ways.items():
            before = time.perf_counter()
            found = answer()
            took = time.perf_counter() - before
            print(f"round {number}, {name}: {took:.1f} s, {found[1]:,} tokens", flush=True)
            if number:
                measured[name].append((took, found))
    return measured


def table(
    arguments: Any,
    recipe: dict[str, Any],
    prompts: list[list[int]],
    measured: dict[str, list[tuple[float, Answered]]],
) -> list[dict[str, Any]]:
    """Returns a row for each way."""
    texts = measured["own generator"][0][1][0]
    paces = {name: [found[1] / took for took, found in one] for name, one in measured.items()}
    about, lines = provenance(), []
    for name, pace in paces.items():
        ratios = [one / ours for one, ours in zip(pace, paces["own generator"], strict=True)]
        found = measured[name][0][1]
        lines.append(
            {
                "who": name,
                "model": Path(recipe["model_name_or_path"]).name,
                "dtype": recipe["dtype"],
                "rows": len(prompts),
                "prompt_tokens": sum(map(len, prompts)),
                "tokens": found[1],
                "tokens_per_s": round(statistics.median(pace), 1),
                "ratio_to_own": round(statistics.median(ratios), 3),
                "answers_of_own": sum(a == b for a, b in zip(found[0], texts, strict=True)),
                "rounds": " ".join(f"{one:.1f}" for one in pace),
                "threads": torch.get_num_threads(),
                **about,
                "command": shown_command(arguments),
            }
        )
    return lines


def shown_command(arguments: Any) -> str:
    """Returns the command that measures the same again."""
    options = ("rows", "max_new_tokens", "batch_size", "requests", "rounds")
    given = " ".join(f"--{name} {getattr(arguments, name)}" for name in options)
    return (
        f"OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/served_speed.py --run RUN "
        f"--server URL {given}"
    )


if __name__ == "__main__":
    with mistakes_in_one_line():
        main(sys.argv[1:])
