"""How fast answers are generated on one machine: captured, compiled and plain steps, and peers.

python benchmarks/decoding_speed.py [--shape llama3.2-1b] [--prompts 128] [--new_tokens 128]
    [--batch_size 64] [--rounds 2] [--out results/decoding_speed]

A random-initialised model of that shape in bfloat16 with a LoRA adapter, r=16 on q, v and o,
answers prompts of 32 to 256 random tokens, the longest first. Nothing ends an answer, so every one
has all its tokens. Base is the model without its adapter, tuned with it.

Each way warms up with its first batch, or with four prompts where nothing is captured or compiled:
that is first_s. Then the ways answer all prompts in turn, --rounds times. `like_plain` is the share
of the tokens before the first one that differs from the plain way's: random weights have many
nearly equal logits, and bfloat16 rounds them. The table is written after every way and round.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from sftlab.data.chat_template import TurnEnd, set_template
from sftlab.evaluation.base_and_tuned import SIDES, answering
from sftlab.evaluation.generation import Generator, Sampling
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.measurement.hardware_limit import synchronize
from sftlab.models.inner_model import inner_model
from sftlab.models.random_models import MODEL_SHAPES, make_random_files, random_files
from sftlab.paths import ROOT
from sftlab.runs.environment import provenance
from sftlab.script_options import Options
from sftlab.tables import aligned, write_csv

PLAIN = "plain steps"
# of a generator of this project: its fixed rows, and whether it captures
WAYS = {"captured steps": (False, True), "compiled steps": (True, False), PLAIN: (False, False)}
BATCHED = "generate_batch of transformers"
SHOWN = ("way", "model", "tokens_per_s", "lowest", "highest", "first_s", "like_plain", "note")
Answered = list[list[int]]


def main(argv: list[str]) -> None:
    """Measure every way with base and tuned, write the table, print it."""
    arguments = parse_options(argv)
    tokenizer, model = random_pair(arguments.shape)
    prompts = random_prompts(arguments.prompts, len(tokenizer) - 256)
    ways = ways_of(arguments, model, tokenizer)
    arguments.out.mkdir(parents=True, exist_ok=True)
    about = provenance() | {"command": "python benchmarks/decoding_speed.py"}
    found = {(n, side): {"rates": [], "note": ""} for side in SIDES for n in ways}
    for turn, (name, side) in itertools.product(range(arguments.rounds + 1), list(found)):
        cell = found[name, side]
        if cell["note"]:
            continue
        short = 4 if name in (PLAIN, BATCHED) else arguments.batch_size
        try:
            with answering(model, side):
                seconds, new = timed(ways[name], prompts if turn else prompts[:short])
            keep(cell, turn, seconds, new)
            print(f"{turn} {name}, {side}: {seconds:.1f} s", flush=True)
        except Exception as error:  # a peer's failure costs its own row alone
            cell["note"] = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        lines = [line_of(arguments, key, one, found) | about for key, one in found.items()]
        write_csv(arguments.out / "decoding_speed.csv", lines)
    print(aligned([list(SHOWN), *([str(line[name]) for name in SHOWN] for line in lines)]))


def keep(cell: dict[str, Any], turn: int, seconds: float, new: Answered) -> None:
    """Keep what a turn gave; the first one warms up."""
    if turn:
        cell["rates"].append(sum(map(len, new)) / seconds)
        cell["answers"] = new
    else:
        cell["first_s"] = round(seconds, 1)


def parse_options(argv: list[str]) -> argparse.Namespace:
    """Returns the command line."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=MODEL_SHAPES, default="llama3.2-1b")
    for name, default in (("prompts", 128), ("new_tokens", 128), ("batch_size", 64), ("rounds", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "decoding_speed")
    return parser.parse_args(argv)


def random_pair(shape: str) -> tuple[PreTrainedTokenizerBase, PeftModel]:
    """Returns tokenizer and model of a shape, with a random adapter."""
    make_random_files(shape, 512)
    folder, _ = random_files(shape, 512)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    set_template(tokenizer)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    base = base.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    torch.manual_seed(0)
    lora = LoraConfig(r=16, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    model = get_peft_model(base, lora)
    model.base_model.to(torch.bfloat16)
    return tokenizer, model


def random_prompts(count: int, words: int) -> list[list[int]]:
    """Returns prompts of 32 to 256 random tokens, the longest first."""
    generator = np.random.default_rng(0)
    lengths = sorted(generator.integers(32, 257, count), reverse=True)
    return [generator.integers(0, words, length).tolist() for length in lengths]


def ways_of(
    arguments: argparse.Namespace, model: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Callable[[list[list[int]]], Answered]]:
    """Returns what answers prompts, by the names of the table."""
    sampling, size = Sampling(arguments.new_tokens), arguments.batch_size

    def own(fixed: bool, capture: bool) -> Callable[[list[list[int]]], Answered]:
        generator = Generator(model, tokenizer, sampling, size if fixed else None, capture)
        # ids that no answer has
        generator.turn = TurnEnd([], [])
        if capture and not generator.captures and model.device.type == "cuda":
            raise ValueError("this model's steps are not captured")

        def answer(prompts: list[list[int]]) -> Answered:
            inner_model(model).generation_config.eos_token_id = None
            parts = [prompts[i : i + size] for i in range(0, len(prompts), size)]
            return [ids for part in parts for ids in generator.token_ids(part)]

        return answer

    def batched(prompts: list[list[int]]) -> Answered:
        config = GenerationConfig(
            max_new_tokens=arguments.new_tokens, do_sample=False, eos_token_id=-1
        )
        found = inner_model(model).generate_batch(prompts, generation_config=config)
        named = {tuple(one.prompt_ids): one.generated_tokens for one in found.values()}
        answers = [named[tuple(prompt)] for prompt in prompts]
        if short := sum(len(one) < arguments.new_tokens for one in answers):
            raise RuntimeError(f"{short} of {len(answers)} answers are not finished")
        return answers

    return {name: own(*how) for name, how in WAYS.items()} | {BATCHED: batched}


def timed(
    answer: Callable[[list[list[int]]], Answered], prompts: list[list[int]]
) -> tuple[float, Answered]:
    """Returns the seconds and the answers."""
    synchronize()
    started = time.perf_counter()
    found = answer(prompts)
    synchronize()
    return time.perf_counter() - started, found


def line_of(
    arguments: argparse.Namespace,
    key: tuple[str, str],
    cell: dict[str, Any],
    found: dict[tuple[str, str], dict[str, Any]],
) -> dict[str, Any]:
    """Returns a row of the table."""
    rates, plain = sorted(cell["rates"]), found.get((PLAIN, key[1]), {}).get("answers")
    alike = same_start(cell["answers"], plain) if plain and "answers" in cell else ""
    return {
        "way": key[0],
        "model": key[1],
        "tokens_per_s": round(statistics.median(rates)) if rates else "",
        "lowest": round(rates[0]) if rates else "",
        "highest": round(rates[-1]) if rates else "",
        "first_s": cell.get("first_s", ""),
        "like_plain": alike,
        "note": cell["note"],
        "rounds": len(rates),
        **{name: getattr(arguments, name) for name in ("shape", "prompts", "new_tokens")},
        "batch_size": arguments.batch_size,
    }


def same_start(answers: Answered, others: Answered) -> float:
    """Returns the share of tokens before the first that differs, over all answers."""
    same = 0
    for one, other in zip(answers, others, strict=True):
        differ = [a != b for a, b in zip(one, other, strict=False)]
        same += differ.index(True) if True in differ else len(differ)
    return round(same / sum(map(len, others)), 3)


if __name__ == "__main__":
    with mistakes_in_one_line():
        main(sys.argv[1:])
