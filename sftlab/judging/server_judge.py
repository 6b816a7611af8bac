"""A judge behind an OpenAI-compatible server: asked greedily, and waited for with patience."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from sftlab.evaluation.generation import Answer, Unfinished
from sftlab.judging.judge_formats import Messages
from sftlab.tables import preview

if TYPE_CHECKING:
    import httpx

# tries again after a failure of the server, the pause before the first one, and the longest pause
RETRIES = 6
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0
# how long a server may limit requests (status 429) before the evaluation ends
RATE_LIMITED_S = 300.0
# A request that hangs is asked once more.
TIMED_OUT_TRIES = 2
KEPT = "judgements are kept, and the same command goes on from there"


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
        import openai

        self.openai, self.name, self.url, self.max_new_tokens = openai, name, url, max_new_tokens
        self.timeout = timeout
        key = os.environ.get("OPENAI_API_KEY", "none")
        self.client = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=timeout)
        self.facts = {"judge": name, "server": url, "max_new_tokens": max_new_tokens}
        context = context or self._served_context()
        self.room = context - max_new_tokens if context else None

    def _served_context(self) -> int | None:
        with self._explained():
            listed = self._patiently(self.client.models.with_raw_response.list)
        models = self._json(listed).get("data")
        if not _is_list_of_objects(models):
            self._no_completion(listed.text)
        served = {str(model.get("id")): model for model in models}
        if self.name not in served:
            raise ValueError(
                f"the server at {self.url} has no model {self.name!r}: it has {', '.join(served)}"
            )
        context = served[self.name].get("max_model_len")
        return context if type(context) is int else None

    def size(self, messages: Messages) -> int:
        """Returns an estimate of a prompt's tokens."""
        return math.ceil(sum(len(message["content"].encode()) for message in messages) / 3)

    def answers(self, prompts: Sequence[Messages], seed: int = 0) -> list[Answer]:
        """Returns one judgement per prompt, all asked at once.

        Raises Unfinished with the answers that came, where one request fails.
        """
        with ThreadPoolExecutor(len(prompts)) as threads:
            asked = [threads.submit(self._answer, messages) for messages in prompts]
        done = {i: one.result() for i, one in enumerate(asked) if one.exception() is None}
        try:
            with self._explained():
                return [one.result() for one in asked]
        except ValueError as error:
            raise Unfinished(str(error), done) from error

    def _answer(self, messages: Messages) -> Answer:
        """Returns the judgement of one prompt. Raises ValueError for what is no completion."""
        given = {"model": self.name, "messages": messages, "max_tokens": self.max_new_tokens}
        create = self.client.chat.completions.with_raw_response.create
        came = self._patiently(lambda: create(temperature=0, **given))
        body = self._json(came)
        choices = body.get("choices")
        message = choices[0].get("message") if _is_list_of_objects(choices) else None
        if not isinstance(message, dict):
            self._no_completion(came.text)
        text = _said(message)
        usage = body.get("usage") or {}
        tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
        finish = "length" if choices[0].get("finish_reason") == "length" else "stop"
        return Answer(text, tokens if type(tokens) is int else len(text.split()), finish, False)

    def _json(self, came: "httpx.Response") -> dict[str, Any]:
        """Returns the object that an answer of the server holds."""
        try:
            body = json.loads(came.text)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            self._no_completion(came.text)
        return body

    def _no_completion(self, said: str) -> NoReturn:
        raise ValueError(
            f"what the judge's server at {self.url} answers is no completion: "
            f"{preview(said, 300) or '(nothing)'}; {KEPT}"
        )

    def _patiently(self, ask: Callable[[], Any]) -> Any:
        """Returns what `ask` does, asked again while the server fails or limits requests."""
        failed, waited = 0, 0.0
        while True:
            try:
                return ask()
            except self.openai.APITimeoutError:
                failed, pause = failed + 1, 0.0
                if failed >= TIMED_OUT_TRIES:
                    raise
            except (self.openai.APIConnectionError, self.openai.InternalServerError):
                failed, pause = failed + 1, FIRST_PAUSE_S * 2**failed
                if failed > RETRIES:
                    raise
            except self.openai.RateLimitError as error:
                pause = _asked_pause(error.response.headers.get("retry-after"))
                pause = min(LONGEST_PAUSE_S, pause or 1.0 + waited)
                waited += max(pause, 0.01)
                if waited > RATE_LIMITED_S or error.code == "insufficient_quota":
                    raise
            time.sleep(min(pause, LONGEST_PAUSE_S))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the client's errors into a ValueError of one sentence."""
        where = f"the judge's server at {self.url}"
        try:
            yield
        except self.openai.APITimeoutError as error:
            raise ValueError(
                f"{where} did not answer within {self.timeout:g} s, tried {TIMED_OUT_TRIES} times: "
                f"{KEPT}; a slow judge needs a longer --judge_timeout"
            ) from error
        except (self.openai.APIConnectionError, self.openai.InternalServerError) as error:
            words = (
                f" (it says: {preview(error.message, 200)})"
                if hasattr(error, "status_code")
                else ""
            )
            raise ValueError(
                f"{where} does not answer, tried {RETRIES + 1} times: {KEPT}{words}"
            ) from error
        except self.openai.RateLimitError as error:
            raise ValueError(
                f"{where} limits requests (status 429: {preview(error.message, 200)}), and went on "
                f"to for {RATE_LIMITED_S:g} s: {KEPT}"
            ) from error
        except self.openai.APIStatusError as error:
            said = preview(error.message, 300)
            raise ValueError(
                f"{where} refuses with status {error.status_code}: {said}; {KEPT}"
            ) from error


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _said(message: dict[str, Any]) -> str:
    """Returns a message's text; its reasoning is another field, and no judgement."""
    content = message.get("content") or message.get("refusal") or ""
    if isinstance(content, list):
        parts = [part.get("text", "") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    return content.strip() if isinstance(content, str) else ""


def _asked_pause(header: str | None) -> float | None:
    """Returns the seconds of a `retry-after` header, None where it has none."""
    try:
        return max(float(header), 0.0) if header else None
    except ValueError:
        return None
