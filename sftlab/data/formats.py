"""The data formats that rows come in, and the conversations they are read as."""

from collections.abc import Callable, Iterator
from typing import Any

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
Message = dict[str, str]  # role and content
# the messages before an answer, and the answer
PromptResponse = tuple[list[Message], str]


def recognise_format(columns: list[str]) -> str:
    """Returns the one data format whose columns are all there.

    Raises ValueError for none and for several.
    """
    found = [name for name, (needed, _, _) in DATA_FORMATS.items() if set(needed) <= set(columns)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"the columns {', '.join(columns)} match the data formats {' and '.join(found)}: say "
            f"which is meant with dataset_shape, for example --dataset_shape {found[-1]}"
        )
    known = "; ".join(
        f"{shape} ({', '.join(needed)})" for shape, (needed, _, _) in DATA_FORMATS.items()
    )
    raise ValueError(f"the columns {', '.join(columns)} match no data format; known are {known}")


def _text(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(
            f"{column} is not text but {type(value).__name__} ({value!r:.60}): write it as "
            "text, in quotes"
        )
    return value


def _single(user: str, response: str, system: str = "") -> Iterator[PromptResponse]:
    if not user.strip():
        raise ValueError("the prompt is empty")
    messages = [{"role": "system", "content": system}] if system.strip() else []
    yield [*messages, {"role": "user", "content": user}], response


def _with_context(instruction: str, context: str) -> str:
    # The heading is part of the message, so that it reads the same under every chat template.
    return f"{instruction}\n\n### Context:\n{context}" if context.strip() else instruction


def _conversation(messages: Any, first: int = 0) -> Iterator[PromptResponse]:
    """Yield each of the assistant's messages that follow a user's, with the messages before it.

    Messages before number `first` are not yielded.
    """
    if not isinstance(messages, list):
        raise TypeError(f"a conversation must be a list of messages, got {type(messages).__name__}")
    history: list[Message] = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise TypeError(f"message {number} has no role and content but is {message!r:.60}")
        name = _text(message, "from") or _text(message, "role")
        content = _text(message, "value") or _text(message, "content")
        if name not in _ROLES:
            raise ValueError(f"unknown role {name!r}: known are {', '.join(_ROLES)}")
        role = _ROLES[name]
        if number >= first and role == "assistant" and any(m["role"] == "user" for m in history):
            yield list(history), content
        if role != "assistant" or history:
            history.append({"role": role, "content": content})


def _prompt_completion(row: dict[str, Any]) -> Iterator[PromptResponse]:
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        yield from _single(_text(row, "prompt"), _text(row, "completion"))
        return
    before = (
        prompt if isinstance(prompt, list) else [{"role": "user", "content": _text(row, "prompt")}]
    )
    after = (
        completion
        if isinstance(completion, list)
        else [{"role": "assistant", "content": completion}]
    )
    turns = list(_conversation([*before, *after], first=len(before)))
    if not turns:
        raise ValueError("the completion has no assistant's message that follows a user's")
    yield from turns


# name: (columns it needs, columns it may have, row -> (prompt, response) pairs)
DATA_FORMATS: dict[
    str,
    tuple[tuple[str, ...], tuple[str, ...], Callable[[dict[str, Any]], Iterator[PromptResponse]]],
] = {
    "openorca": (
        ("question", "response"),
        ("system_prompt",),
        lambda r: _single(_text(r, "question"), _text(r, "response"), _text(r, "system_prompt")),
    ),
    "dolly": (
        ("instruction", "response"),
        ("context",),
        lambda r: _single(
            _with_context(_text(r, "instruction"), _text(r, "context")), _text(r, "response")
        ),
    ),
    "alpaca": (
        ("instruction", "output"),
        ("input",),
        lambda r: _single(
            _with_context(_text(r, "instruction"), _text(r, "input")), _text(r, "output")
        ),
    ),
    "gsm8k": (
        ("question", "answer"),
        (),
        lambda r: _single(_text(r, "question"), _text(r, "answer")),
    ),
    "sharegpt": (("conversations",), (), lambda r: _conversation(r["conversations"])),
    "messages": (("messages",), (), lambda r: _conversation(r["messages"])),
    "prompt_completion": (("prompt", "completion"), (), _prompt_completion),
}
