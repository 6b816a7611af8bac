"""A client of an OpenAI-compatible server, such as vLLM: patient, and clear about what failed."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

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


class Words(NamedTuple):
    """How errors speak of a server: who it is, what is kept, and what helps a slow one."""

    who: str
    kept: str
    slow: str


class ServerClient:
    """Sends requests to a server, and again while it fails, hangs or limits requests.

    `url` ends in /v1. The environment's `OPENAI_API_KEY` is sent. `timeout` is in seconds, for one
    request. Every method raises ValueError of one sentence, in `words`, where the server fails for
    good.
    """

    def __init__(self, url: str, words: Words, timeout: float = 300.0) -> None:
        import openai

        self.openai, self.url, self.words, self.timeout = openai, url, words, timeout
        key = os.environ.get("OPENAI_API_KEY", "none")
        self.client = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=timeout)

    def models(self) -> dict[str, dict[str, Any]]:
        """Returns what the server says of its models, by their names."""
        listed = self._asked(self.client.models.with_raw_response.list)
        models = self._json(listed).get("data")
        if not _is_list_of_objects(models):
            self._unreadable(listed.text)
        return {str(model.get("id")): model for model in models}

    def refuse_unserved(self, name: str) -> dict[str, Any]:
        """Returns what the server says of a model. Raises ValueError where it has none of it."""
        served = self.models()
        if name not in served:
            raise ValueError(
                f"the server at {self.url} has no model {name!r}: it has {', '.join(served)}"
            )
        return served[name]

    def chat(self, **request: Any) -> dict[str, Any]:
        """Returns a chat completion, whose first choice has a message."""
        came = self._asked(lambda: self.client.chat.completions.with_raw_response.create(**request))
        body = self._json(came)
        choices = body.get("choices")
        if not _is_list_of_objects(choices) or not isinstance(choices[0].get("message"), dict):
            self._unreadable(came.text)
        return body

    def completion(self, **request: Any) -> dict[str, Any]:
        """Returns a completion, whose first choice has a text."""
        came = self._asked(lambda: self.client.completions.with_raw_response.create(**request))
        body = self._json(came)
        choices = body.get("choices")
        if not _is_list_of_objects(choices) or not isinstance(choices[0].get("text"), str):
            self._unreadable(came.text)
        return body

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Returns the object that the server answers at a path of its root, such as /tokenize."""
        import httpx

        url = self.url.rstrip("/").removesuffix("/v1") + path
        post = self.client.post
        return self._json(self._asked(lambda: post(url, body=body, cast_to=httpx.Response)))

    def _asked(self, ask: Callable[[], Any]) -> "httpx.Response":
        with self._explained():
            return self._patiently(ask)

    def _json(self, came: "httpx.Response") -> dict[str, Any]:
        """Returns the object that an answer of the server holds."""
        try:
            body = json.loads(came.text)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            self._unreadable(came.text)
        return body

    def _unreadable(self, said: str) -> NoReturn:
        raise ValueError(
            f"what {self.words.who} at {self.url} answers is no completion: "
            f"{preview(said, 300) or '(nothing)'}; {self.words.kept}"
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
        where, kept = f"{self.words.who} at {self.url}", self.words.kept
        try:
            yield
        except self.openai.APITimeoutError as error:
            raise ValueError(
                f"{where} did not answer within {self.timeout:g} s, tried {TIMED_OUT_TRIES} times: "
                f"{kept}; {self.words.slow}"
            ) from error
        except (self.openai.APIConnectionError, self.openai.InternalServerError) as error:
            words = (
                f" (it says: {preview(error.message, 200)})"
                if hasattr(error, "status_code")
                else ""
            )
            raise ValueError(
                f"{where} does not answer, tried {RETRIES + 1} times: {kept}{words}"
            ) from error
        except self.openai.RateLimitError as error:
            raise ValueError(
                f"{where} limits requests (status 429: {preview(error.message, 200)}), and went on "
                f"to for {RATE_LIMITED_S:g} s: {kept}"
            ) from error
        except self.openai.APIStatusError as error:
            said = preview(error.message, 300)
            raise ValueError(
                f"{where} refuses with status {error.status_code}: {said}; {kept}"
            ) from error


def used_tokens(body: dict[str, Any]) -> int | None:
    """Returns the tokens of a completion, as the server counts them; None where it does not."""
    usage = body.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return tokens if type(tokens) is int else None


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _asked_pause(header: str | None) -> float | None:
    """Returns the seconds of a `retry-after` header, None where it has none."""
    try:
        return max(float(header), 0.0) if header else None
    except ValueError:
        return None
