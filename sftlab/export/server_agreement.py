"""Does a running server answer as the run? It is asked what an export is asked.

The server must be vLLM or speak its dialect: `/tokenize` renders messages, and a completion with
`echo` and `logprobs` has the log-probabilities of its prompt.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sftlab.data.chat_template import TurnEnd
from sftlab.evaluation.answer_file import AnswerFile
from sftlab.evaluation.base_and_tuned import answering
from sftlab.evaluation.generation import Sampling, turn_of
from sftlab.evaluation.held_out import HeldOut, ScoredRows, held_out
from sftlab.evaluation.served_answers import (
    Asking,
    ServedModels,
    fill_served,
    prompt_logprobs,
)
from sftlab.evaluation.server_client import ServerClient
from sftlab.export.agreement import (
    MAX_NEW_TOKENS,
    Agreement,
    Behaviour,
    compare,
    compared_rows,
    observe,
)
from sftlab.export.formats import end_ids

# what is added to a token's logit so that it comes next: the most that the interface takes
_CERTAIN = 100
# requests that are under way together
_AT_ONCE = 16
# rows on which a server is held to transformers before it answers an evaluation
HELD_ROWS = 8


def hold_to_run(
    client: ServerClient,
    name: str,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: HeldOut,
    count: int,
    max_length: int | None,
    dtype: str,
) -> Agreement:
    """Returns how far the server's model `name` is from `model`, on `count` held-out rows.

    `dtype` is that of the served weights. Raises ValueError where they differ, and where the server
    cannot be asked.
    """
    client.refuse_unserved(name)
    rows = compared_rows(model.config, tokenizer, dataset, count, max_length)
    ends = end_ids(model, tokenizer)
    found = observe_server(client, name, rows, sorted({*ends, *tokenizer.all_special_ids}))
    expected = observe(model, tokenizer, dataset, count, ends, max_length)
    agreement = compare(expected, found, dtype)
    if agreement.differs:
        raise ValueError(
            f"{name} on the server at {client.url} does not answer as the run: {agreement.differs}"
        )
    return agreement


class LoadedRun(NamedTuple):
    """A run's record, its two models under one load of the weights, and its tokenizer."""

    run: dict[str, Any]
    model: PeftModel | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def turn(self) -> TurnEnd:
        """Returns what ends an answer of the run's models."""
        return turn_of(self.model, self.tokenizer)


def hold_side(served: ServedModels, loaded: LoadedRun, side: str) -> None:
    """Hold the server's base or tuned to transformers, on a few held-out rows of the run.

    Raises ValueError where it differs.
    """
    run, model, tokenizer = loaded
    recipe = run["recipe"]
    limits = (HELD_ROWS, recipe["max_length"], recipe["dtype"])
    with answering(model, side):
        hold_to_run(served.client, served.names[side], model, tokenizer, held_out(run), *limits)


def answers_of_held_server(
    served: ServedModels,
    loaded: LoadedRun,
    side: str,
    file: AnswerFile,
    rows: Sequence[int | str],
    prompts: Sequence[list[int]],
    sampling: Sampling,
    title: str,
) -> None:
    """Fill `file` with the server's answers of base or tuned, where any is missing.

    The server is held to transformers on a few held-out rows of the run first. Raises ValueError
    where it differs, and where an answer does not come.
    """
    if all((side, row) in file.found for row in rows):
        return
    hold_side(served, loaded, side)
    ask = Asking(served.client, served.names[side], loaded.tokenizer, sampling, loaded.turn)
    fill_served(file, side, rows, prompts, served, ask, title)


def observe_server(
    client: ServerClient, name: str, rows: ScoredRows, may_end: Sequence[int]
) -> Behaviour:
    """Returns what the server's model `name` makes of rows.

    Greedy answers are asked for as chat, so the server's own template and end tokens decide. Its
    end tokens are looked for among `may_end`: answers may be too long to feel a missing one.
    """
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        prompts = list(threads.map(lambda row: _prompt_ids(client, name, row), rows.rows))
        nats = list(threads.map(lambda row: _nats(client, name, row), rows.encoded))
        ended = list(threads.map(lambda row: _ends(client, name, row), rows.rows))
        at = list(threads.map(lambda token: _ends_at(client, name, rows.rows[0], token), may_end))
    ends = [token for token, stops in zip(may_end, at, strict=True) if stops]
    return Behaviour(prompts, np.array(nats), ended, ends)


def _messages(row: dict[str, Any]) -> dict[str, Any]:
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    return {"messages": row["prompt"]} | tools


def _prompt_ids(client: ServerClient, name: str, row: dict[str, Any]) -> list[int]:
    """Returns the token ids that the server makes of a row's messages."""
    asked = _messages(row) | {"model": name, "add_generation_prompt": True}
    ids = client.post("/tokenize", asked).get("tokens")
    if not isinstance(ids, list):
        raise ValueError(
            f"the server at {client.url} does not tokenize messages (/tokenize): serve it with vLLM"
        )
    return ids


def _nats(client: ServerClient, name: str, row: dict[str, list[int]]) -> list[float]:
    """Returns the summed nats of a row's response, and its number of tokens."""
    each = prompt_logprobs(client, name, row["input_ids"]).each
    places = [i for i, label in enumerate(row["labels"]) if i and label != -100]
    return [-sum(each[place] for place in places), len(places)]


def _ends(client: ServerClient, name: str, row: dict[str, Any]) -> bool:
    """Returns whether the server's greedy answer ends by itself."""
    body = client.chat(model=name, max_tokens=MAX_NEW_TOKENS, temperature=0, **_messages(row))
    return body["choices"][0].get("finish_reason") != "length"


def _ends_at(client: ServerClient, name: str, row: dict[str, Any], token: int) -> bool:
    """Returns whether a token ends the server's answers, by making it the only likely one."""
    body = client.chat(
        model=name,
        max_tokens=2,
        temperature=0,
        logit_bias={str(token): _CERTAIN},
        **_messages(row),
    )
    return body["choices"][0].get("finish_reason") != "length"
