"""What chatting costs over bare generation: time to the first token, and tokens/s.

python benchmarks/chat_speed.py --run RUN [--tokens 128] [--rounds 7] [--load_in_4bit] \
    [--out results/chat_speed]

Four ways answer the same message in changing order: `generate` with a TextIteratorStreamer (two of
them over a batch of both models), the engine (sftlab/chat/engine.py), the app in a process of its
own over HTTP, and the app through gradio_client. The last two need gradio. A first round warms up.
Ratios to bare `generate` are of one round each. No answer ends before it has all its tokens.

Writes cpu.csv, or the name of the GPU such as h200.csv. Rows of other commands stay in that file.
With `--tokenizer DIR` and `--dataset FILE` a RUN that does not exist is made: two training steps on
a random model of Llama-3.2-1B's shape.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)

import argparse
import contextlib
import importlib.util
import json
import runpy
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

import sftlab.evaluation.generation
from sftlab.chat.engine import Chat
from sftlab.chat.sampling import Settings
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.paths import ROOT
from sftlab.runs.environment import machine_name, provenance
from sftlab.runs.run_directory import SIDES
from sftlab.models.random_models import train_random_llama
from sftlab.data.chat_template import end_of_turn, prompt_ids
from sftlab.script_options import Options
from sftlab.tables import read_csv, write_csv

MESSAGE = (
    "Write these words in reverse order: mouse, plum, bear, car, lemon, river, rice, hammer, "
    "train, cat, book."
)
CELLS = {"one, greedy": (("tuned",), 0.0), "one, drawn": (("tuned",), 0.7)}
CELLS |= {"both, greedy": (SIDES, 0.0), "both, drawn": (SIDES, 0.7)}
FEW_STEPS = (
    *("--max_steps=2", "--max_length=64", "--global_batch_size=1"),
    *("--per_device_train_batch_size=1", "--split_fractions", "0.98", "0.002", "0.018"),
)


class Speed(NamedTuple):
    """Seconds to the first token, tokens/s after it, and the peak bytes of GPU memory."""

    first_token_s: float
    tokens_per_s: float
    peak: int


class RowStreamer(BaseStreamer):
    """A TextIteratorStreamer for each row of a batch."""

    def __init__(self, tokenizer: Any, rows: int) -> None:
        self.rows = [
            TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            for _ in range(rows)
        ]

    def put(self, value: torch.Tensor) -> None:
        """The prompts, or each row's next token."""
        for streamer, row in zip(self.rows, value, strict=True):
            streamer.put(row if row.dim() else row[None])

    def end(self) -> None:
        """No more tokens come."""
        for streamer in self.rows:
            streamer.end()


def timed(states: Callable[[], Iterator[int]]) -> Speed:
    """Time an answer, given as the number of tokens after each of its pieces."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = first = time.perf_counter()
    begun = tokens = 0
    for tokens in states():
        if not begun:
            first, begun = time.perf_counter(), tokens
    seconds = time.perf_counter() - first
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return Speed(first - started, (tokens - begun) / seconds, peak)


def bare(chat: Chat, sides: tuple[str, ...], settings: Settings) -> Iterator[int]:
    """Answer by `generate` in a thread, with the text from a streamer."""
    prompt = prompt_ids(chat._tokenizer, [{"role": "user", "content": MESSAGE}])
    ids = torch.tensor([prompt] * len(sides), device=chat._model.device)
    streamer = RowStreamer(chat._tokenizer, len(sides))
    drawn = {
        "do_sample": True,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
    }
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": settings.max_new_tokens,
    }
    given |= drawn if settings.temperature else {}
    given |= {"adapter_names": ["__base__", "default"]} if len(sides) > 1 else {}
    thread = threading.Thread(target=chat._model.generate, kwargs={**given, "streamer": streamer})
    thread.start()
    for tokens, _ in enumerate(streamer.rows[-1], 1):
        yield min(tokens, settings.max_new_tokens)  # its end brings one item more
    thread.join()


def engine(chat: Chat, sides: tuple[str, ...], settings: Settings) -> Iterator[int]:
    """Answer by the app's engine without the app."""
    for piece in chat.reply(
        [{"role": "user", "content": MESSAGE}], sides, settings, threading.Event()
    ):
        yield max(piece.tokens.values())


def app(url: str, sides: tuple[str, ...], settings: Settings) -> Iterator[int]:
    """Answer by the app over HTTP, as a browser or curl asks it."""
    side, steered = "both" if len(sides) > 1 else sides[0], list(vars(settings).values())
    body = json.dumps({"data": [MESSAGE, None, side, "", *steered, None]}).encode()
    asked = urllib.request.Request(
        f"{url}/gradio_api/call/chat", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{url}/gradio_api/call/chat/{event}") as lines:
        for line in lines:
            kind, _, value = line.decode().strip().partition(": ")
            if kind == "data" and value != "null":
                yield max(json.loads(value)[0]["tokens"].values())


def gradio_client(client: Any, sides: tuple[str, ...], settings: Settings) -> Iterator[int]:
    """Answer by the app through the Python client."""
    side = "both" if len(sides) > 1 else sides[0]
    for said in client.submit(MESSAGE, side=side, **vars(settings), api_name="/chat"):
        yield max(said["tokens"].values())


def endless() -> None:
    """Let answers end at no end token and no stop string. Both are still looked for."""

    def turn(tokenizer: Any, ends: Any) -> Any:
        found = end_of_turn(tokenizer, ends)
        return found._replace(
            end_tokens=[], stop_strings=[stop.upper() for stop in found.stop_strings]
        )

    sftlab.evaluation.generation.end_of_turn = turn


@contextlib.contextmanager
def serving(run: Path, flags: list[str]) -> Iterator[dict[str, Callable]]:
    """Run the app on this run, and give the ways to ask it; none where gradio is missing."""
    if importlib.util.find_spec("gradio") is None:
        print("gradio is not installed here: the app is left out", flush=True)
        yield {}
        return
    from gradio_client import Client

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve", "--run", str(run), "--port", port, *flags]
    )
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(port))):
                break
            time.sleep(0.2)
        url = f"http://127.0.0.1:{port}"
        yield {
            "app": partial(app, url),
            "app, gradio_client": partial(gradio_client, Client(url, verbose=False)),
        }
    finally:
        process.terminate()
        process.wait()


def after_closing(chat: Chat) -> float:
    """Returns the GB of GPU memory that an answer leaves behind when it is closed half-way."""
    before = torch.cuda.memory_allocated()
    settings = Settings(0, max_new_tokens=64)
    answer = chat.reply([{"role": "user", "content": MESSAGE}], SIDES, settings, threading.Event())
    next(answer)
    answer.close()
    return round((torch.cuda.memory_allocated() - before) / 2**30, 4)


def measure(run: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns a row for each cell and way of asking."""
    flags = ["--load_in_4bit"] if arguments.load_in_4bit else []
    chat = Chat(run, load_in_4bit=arguments.load_in_4bit)
    size = chat._model.get_base_model().num_parameters()
    with serving(run, flags) as served:
        ways = {"bare": partial(bare, chat), "engine": partial(engine, chat), **served}
        lines = []
        for cell, (sides, temperature) in CELLS.items():
            settings = Settings(temperature, max_new_tokens=arguments.tokens)
            rounds: list[dict[str, Speed]] = []
            for number in range(arguments.rounds + 1):
                turn = [list(ways)[(number + i) % len(ways)] for i in range(len(ways))]
                rounds.append({way: timed(partial(ways[way], sides, settings)) for way in turn})
            for way in list(ways)[1:]:
                line = {
                    "run": run.name,
                    "parameters": size,
                    "dtype": str(chat._model.dtype),
                    "cell": cell,
                    "way": way,
                }
                lines.append(
                    line
                    | compare(rounds[1:], way)
                    | {"tokens": arguments.tokens, "rounds": arguments.rounds}
                )
                print(json.dumps(lines[-1]), flush=True)
    closed = after_closing(chat) if torch.cuda.is_available() else None
    print(f"GPU memory that an answer leaves once it is closed (GB): {closed}", flush=True)
    chat.close()
    return [line | {"gb_left_by_a_closed_answer": closed} for line in lines]


def compare(rounds: list[dict[str, Speed]], way: str) -> dict[str, Any]:
    """Returns the medians of a way and of the bare one, and their ratios.

    Ratios are taken within a round: median, lowest and highest.
    """
    facts: dict[str, Any] = {}
    for field, digits in (("first_token_s", 4), ("tokens_per_s", 2)):
        one, other = ([getattr(found[name], field) for found in rounds] for name in (way, "bare"))
        ratios = [a / b for a, b in zip(one, other, strict=True)]
        facts |= {
            field: round(statistics.median(one), digits),
            f"bare_{field}": round(statistics.median(other), digits),
        }
        spread = statistics.median(ratios), min(ratios), max(ratios)
        facts |= {
            f"{field}_ratio{name}": round(r, 3)
            for name, r in zip(("", "_min", "_max"), spread, strict=True)
        }
    if torch.cuda.is_available() and way == "engine":
        peaks = {
            name: round(max(found[name].peak for found in rounds) / 2**30, 3)
            for name in ("engine", "bare")
        }
        facts |= {"peak_gb": peaks["engine"], "bare_peak_gb": peaks["bare"]}
    else:  # the app's memory is another process's
        facts |= {"peak_gb": None, "bare_peak_gb": None}
    return facts


def main() -> None:
    """Make the run where it is missing, measure, write the table."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="finished run directory")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "chat_speed")
    parser.add_argument(
        "--tokenizer", help="to make a missing run: folder of a tokenizer of at most 128,256 tokens"
    )
    parser.add_argument("--dataset", help="to make a missing run: local data file")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--load_in_4bit", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--port", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    endless()
    if arguments.serve:
        serve(arguments)
        return
    run = arguments.run
    if not (run / "run.json").is_file() and arguments.tokenizer and arguments.dataset:
        config = "single" if torch.cuda.is_available() else "cpu"
        train_random_llama(str(run), arguments.tokenizer, arguments.dataset, config, FEW_STEPS)
    options = f"--tokens {arguments.tokens} --rounds {arguments.rounds}"
    options += " --load_in_4bit" if arguments.load_in_4bit else ""
    command = f"python benchmarks/chat_speed.py --run runs/{run.name} {options}"
    about = provenance() | {"command": command}
    new = [row | about for row in measure(run, arguments)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    table = arguments.out / f"{machine_name()}.csv"
    write_csv(table, [row for row in read_csv(table) if row["command"] != command] + new)


def serve(arguments: argparse.Namespace) -> None:
    """Run app/app.py in this process, whose answers end at no end token."""
    flags = ["--load-in-4bit"] if arguments.load_in_4bit else []
    sys.argv = ["app/app.py", "--run", str(arguments.run), "--port", arguments.port, *flags]
    runpy.run_path(str(ROOT / "app" / "app.py"), run_name="__main__")


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
