"""What a call of the app may hold: checked before a model, a template or a tokenizer sees it."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

MESSAGES = 1000
# characters of a whole conversation, and for long contexts characters for each position
CHARACTERS = 200_000
CHARACTERS_A_TOKEN = 8
_ROLES = ("system", "user", "assistant")


def conversation(message: object, history: object, system: object) -> list[dict[str, str]]:
    """Returns the messages of an API call: system, history, message.

    Raises ValueError where one has another form, or the message is empty.
    """
    instruction = text(system, "system").strip()
    earlier = [{"role": "system", "content": instruction}] if instruction else []
    if history is not None and not isinstance(history, list):
        raise ValueError(f"history is {_kind(history)}: expected a list of messages")
    for number, one in enumerate(history or []):
        where = f"history[{number}]"
        if not isinstance(one, dict) or set(one) != {"role", "content"}:
            raise ValueError(f"{where} is no message: expected an object with role and content")
        if one["role"] not in _ROLES:
            raise ValueError(
                f"{where}.role is {str(one['role'])[:40]!r}: expected one of {', '.join(_ROLES)}"
            )
        if one["role"] == "system" and (number or earlier):
            raise ValueError(f"{where} is a second system message: expected one, and that first")
        if one["content"] is None:
            raise ValueError(f"{where}.content is missing: expected a text")
        earlier.append({"role": one["role"], "content": text(one["content"], f"{where}.content")})
    return [*earlier, {"role": "user", "content": message_text(message)}]


def message_text(value: object) -> str:
    """Returns a message's text. Raises ValueError for anything else, and for blanks alone."""
    said = text(value, "message")
    if not said.strip():
        raise ValueError("the message is empty: type something to answer")
    return said


def check_size(messages: Sequence[dict[str, str]], context: int) -> None:
    """Raise ValueError for a conversation that is too long to be looked at.

    `context` is the model's, in tokens.
    """
    if len(messages) > MESSAGES:
        raise ValueError(
            f"the conversation has {len(messages):,} messages: at most {MESSAGES:,} are taken, so "
            "begin a new one"
        )
    most = max(CHARACTERS, CHARACTERS_A_TOKEN * context)
    size = sum(len(message["content"]) for message in messages)
    if size > most:
        raise ValueError(
            f"the conversation has {size:,} characters: at most {most:,} are taken, so shorten it "
            "or begin a new one"
        )


def text(value: Any, name: str) -> str:
    """Returns a text, "" for None. Raises ValueError for anything else, and for half characters."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_kind(value)}: expected a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds half a character (a lone surrogate, character {error.start})"
        ) from error
    return value


def in_a_note(skip: Callable[[], Any], outputs: int, note: int) -> Callable[..., Any]:
    """Returns a decorator: what a handler refuses with a ValueError is said in the page's note.

    The note is the output at `note` of `outputs`, and the others get `skip()`. An error of a call
    that does not wait in gradio's queue reaches the page without its words.
    """

    def decorate(handler: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(handler)
        def answer(*args: Any, **kwargs: Any) -> Any:
            try:
                return handler(*args, **kwargs)
            except ValueError as error:
                said = [skip() for _ in range(outputs)]
                said[note] = refusal(error)
                return tuple(said)

        return answer

    return decorate


def refusal(error: ValueError) -> str:
    """Returns the page's note on what was refused."""
    return f"**Not taken:** {error}"


def _kind(value: object) -> str:
    """Returns what JSON calls a value, with its article."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    kinds = {list: "a list", dict: "an object", int: "a number", float: "a number", str: "a text"}
    return kinds.get(type(value), f"a {type(value).__name__}")
