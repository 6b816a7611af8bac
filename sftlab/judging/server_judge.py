"""A judge behind an OpenAI-compatible server: asked greedily, and waited for with patience."""

import math
from collections.abc import Sequence
from threading import Thread
from typing import Any

from sftlab.evaluation.generation import Answer, Unfinished
from sftlab.evaluation.server_client import ServerClient, Words, used_tokens
from sftlab.judging.judge_formats import Messages

WORDS = Words(
    "the judge's server",
    "judgements are kept, and the same command goes on from there",
    "a slow judge needs a longer --judge_timeout",
)
# how a server ends an answer that it gives up: vLLM while it stops, and routers of requests
BROKEN_OFF = ("abort", "error")


class ServerJudge:
    """A model behind an OpenAI-compatible server, such as vLLM.

    The environment's `OPENAI_API_KEY` is sent. `context` is the model's context length in tokens;
    without it the server is asked. vLLM tells it. Where a server does not, prompts are not cut.
    Sizes are estimated at three bytes per token, because the server's tokenizer is not known.
    `timeout` is in seconds, for one judgement.
    """

    def __init__(
        self,
        name: str,
        url: str,
        max_new_tokens: int,
        context: int | None = None,
        timeout: float = 300.0,
    ) -> None:
        self.name, self.max_new_tokens = name, max_new_tokens
        self.client = ServerClient(url, WORDS, timeout)
        self.facts = {"judge": name, "server": url, "max_new_tokens": max_new_tokens}
        if not context:
            served = self.client.refuse_unserved(name).get("max_model_len")
            context = served if type(served) is int else None
        self.room = context - max_new_tokens if context else None

    def size(self, messages: Messages) -> int:
        """Returns an estimate of a prompt's tokens."""
        return math.ceil(sum(len(message["content"].encode()) for message in messages) / 3)

    def answers(self, prompts: Sequence[Messages], seed: int = 0) -> list[Answer]:
        """Returns one judgement per prompt, all asked at once.

        Raises Unfinished with the answers that came, where one request fails.
        """
        done: dict[int, Answer] = {}
        failed: dict[int, ValueError] = {}

        def answer(place: int) -> None:
            try:
                done[place] = self._answer(prompts[place])
            except ValueError as error:
                failed[place] = error

        # daemons: a stop does not wait for minutes for a server that hangs
        threads = [Thread(target=answer, args=[i], daemon=True) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            first = failed[min(failed)]
            raise Unfinished(str(first), done) from first
        return [done[place] for place in range(len(prompts))]

    def _answer(self, messages: Messages) -> Answer:
        """Returns the judgement of one prompt. Raises ValueError for what is no completion."""
        body = self.client.chat(
            model=self.name, messages=messages, max_tokens=self.max_new_tokens, temperature=0
        )
        choice = body["choices"][0]
        text, tokens = _said(choice["message"]), used_tokens(body)
        finish = choice.get("finish_reason")
        if finish in BROKEN_OFF:
            raise ValueError(
                f"{WORDS.who} at {self.client.url} broke a judgement off (finish_reason "
                f"{finish!r}): {WORDS.kept}"
            )
        finish = finish if finish in ("length", "content_filter") else "stop"
        return Answer(text, len(text.split()) if tokens is None else tokens, finish, False)


def _said(message: dict[str, Any]) -> str:
    """Returns a message's text; its reasoning is another field, and no judgement."""
    content = message.get("content") or message.get("refusal") or ""
    if isinstance(content, list):
        parts = [part.get("text", "") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    return content.strip() if isinstance(content, str) else ""
