"""Base's and tuned's answers from a server that has both models, kept one by one as they come."""

import argparse
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sftlab.data.chat_template import TurnEnd
from sftlab.evaluation.answer_file import AnswerFile
from sftlab.evaluation.generation import Answer, Sampling, repeats_itself
from sftlab.evaluation.processes import Processes
from sftlab.evaluation.server_client import ServerClient, Words, used_tokens
from sftlab.runs.run_directory import SIDES
from sftlab.script_options import Options, server_address

WORDS = Words(
    "the server",
    "answers are kept, and the same command goes on from there",
    "a slow server needs a longer --server_timeout or fewer --server_requests",
)
# what settings of answers say of them: rounding may turn near ties of two tokens
FACTS = {"answered_by": "server"}


Found = TypeVar("Found")


class LogProbs(NamedTuple):
    """Log-probabilities of a prompt's tokens, each after those before it.

    `each` has one a token, and None for the first. `top` has the likeliest tokens at each place,
    by their text; None where the server tells none.
    """

    each: list[float | None]
    top: list[dict[str, float] | None] | None


class ServedModels(NamedTuple):
    """A server, its names of base and tuned, and how many requests are under way together."""

    client: ServerClient
    names: dict[str, str]
    at_once: int


def add_server_flags(parser: Options) -> None:
    """Add the options that let a server answer."""
    parser.add_argument(
        "--server",
        metavar="URL",
        type=server_address,
        help="a vLLM server answers, such as http://127.0.0.1:8000/v1",
    )
    parser.add_argument(
        "--server_models",
        nargs=2,
        metavar=("BASE", "TUNED"),
        default=SIDES,
        help="its names of the two models (default: base tuned)",
    )
    parser.add_argument(
        "--server_requests", type=int, default=64, help="requests under way at once"
    )
    parser.add_argument("--server_timeout", type=float, default=300, help="seconds for an answer")
    for option in ("--server_models", "--server_requests", "--server_timeout"):
        parser.needs(option, "--server")


def refuse_many_askers(arguments: argparse.Namespace, processes: Processes) -> None:
    """Raise ValueError where several processes would ask a server: one asks it all at once."""
    if processes.count > 1 and arguments.server:
        raise ValueError("a server is asked by one process: launch one, or leave out --server")


def served_models(arguments: argparse.Namespace) -> ServedModels | None:
    """Returns the server that the options name, None without one.

    Raises ValueError where it does not answer or lacks a model.
    """
    if arguments.server is None:
        return None
    if arguments.server_requests < 1 or arguments.server_timeout <= 0:
        raise ValueError("--server_requests must be at least 1 and --server_timeout above 0 s")
    names = dict(zip(SIDES, arguments.server_models, strict=True))
    client = ServerClient(arguments.server, WORDS, arguments.server_timeout)
    for name in names.values():
        client.refuse_unserved(name)
    return ServedModels(client, names, arguments.server_requests)


def fill_served(
    file: AnswerFile,
    side: str,
    rows: Sequence[int | str],
    prompts: Sequence[list[int]],
    served: ServedModels,
    answer: Callable[[list[int], int], Answer],
    title: str,
) -> None:
    """Ask for the answers that `file` does not hold yet, and keep each as it comes.

    `answer` takes a prompt and a seed, which is its place among `prompts`. Raises ValueError where
    an answer does not come; those under way are waited for and kept, and no more are asked.
    """
    missing = [place for place, row in enumerate(rows) if (side, row) not in file.found]
    before = time.perf_counter()
    with tqdm(total=len(rows), initial=len(rows) - len(missing), desc=title, unit="row") as bar:

        def keep(place: int, found: Answer) -> None:
            nonlocal before
            now = time.perf_counter()
            file.add(side, [rows[place]], [found], now - before)
            before = now
            bar.update()

        asked_together(served, missing, lambda place: answer(prompts[place], place), keep)


def asked_together(
    served: ServedModels,
    places: Sequence[int],
    ask: Callable[[int], Found],
    keep: Callable[[int, Found], None],
) -> None:
    """Call `ask` on each place, many at once, and `keep` on what it returns, as it comes.

    Raises the first ValueError of `ask`. What is under way then is waited for and kept, and no more
    is asked.
    """
    failed: list[ValueError] = []

    def patiently(place: int) -> Found | None:
        try:
            return None if failed else ask(place)
        except ValueError as error:
            failed.append(error)
            return None

    with ThreadPoolExecutor(served.at_once) as threads:
        coming = {threads.submit(patiently, place): place for place in places}
        try:
            for one in as_completed(coming):
                if (found := one.result()) is not None:
                    keep(coming[one], found)
        finally:  # Ctrl-C waits for no more than what is under way
            for one in coming:
                one.cancel()
    if failed:
        raise failed[0]


class Asking:
    """Asks a server's model for one answer at a time, under the run's own template.

    Prompts are token ids, and the end of a turn is sent along, so that the server decides neither.
    """

    def __init__(
        self,
        client: ServerClient,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        turn: TurnEnd,
    ) -> None:
        self.client, self.name, self.tokenizer = client, name, tokenizer
        self.sampling, self.turn = sampling, turn

    def __call__(self, prompt: list[int], seed: int) -> Answer:
        """Returns the answer to a prompt. `seed` is added to the seed of the sampling."""
        body = self.completion(prompt, seed)
        choice, used = body["choices"][0], used_tokens(body)
        text, finish = choice["text"], choice["finish_reason"]
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        # its end token is counted by the server alone
        by_token = finish == "stop" and not isinstance(choice.get("stop_reason"), str)
        tokens = len(ids) if used is None else max(0, used - by_token)
        return Answer(text.strip(), tokens, finish, repeats_itself(ids))

    def completion(self, prompt: list[int], seed: int) -> dict[str, Any]:
        """Returns what the server says to a prompt, whose first choice ended by itself or was cut.

        Raises ValueError for another end.
        """
        sampling, url = self.sampling, self.client.url
        # a server's own defaults must not apply
        plain = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True}
        body = self.client.completion(
            model=self.name,
            prompt=prompt,
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed + seed,
            stop=self.turn.stop_strings or None,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            extra_body=plain | {"stop_token_ids": self.turn.end_tokens},
        )
        finish = body["choices"][0].get("finish_reason")
        if finish not in ("stop", "length"):
            raise ValueError(
                f"the server at {url} broke an answer off (finish_reason {finish!r}); {WORDS.kept}"
            )
        return body


def prompt_logprobs(client: ServerClient, name: str, ids: list[int], most: int = 1) -> LogProbs:
    """Returns the log-probabilities of a prompt's tokens under a server's model.

    `most` is how many of the likeliest tokens it is asked for beside each. Raises ValueError where
    the server tells none.
    """
    body = client.completion(
        model=name, prompt=ids, max_tokens=1, echo=True, logprobs=most, temperature=0
    )
    found = body["choices"][0].get("logprobs")
    found = found if isinstance(found, dict) else {}
    each, top = (found.get(key) for key in ("token_logprobs", "top_logprobs"))
    told = isinstance(each, list) and len(each) >= len(ids)
    if not told or not all(isinstance(one, float | int) for one in each[1 : len(ids)]):
        raise ValueError(
            f"the server at {client.url} gives no log-probabilities of a prompt (echo with "
            "logprobs): serve it with vLLM"
        )
    return LogProbs(each[: len(ids)], top[: len(ids)] if isinstance(top, list) else None)
