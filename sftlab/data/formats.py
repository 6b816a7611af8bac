"""The data formats that rows come in, and the conversations they are read as."""

from collections.abc import Callable
from typing import Any

from sftlab.data.messages import DOCUMENT, Conversation, Message, read_conversation, text
from sftlab.data.preference_sides import side_messages
from sftlab.data.tool_calls import parsed

# what OpenAI's requests say besides messages and tools; it is no part of a text
_OF_REQUEST = ("parallel_tool_calls",)


def _single(row: dict[str, Any], user: str, response: str) -> Conversation:
    """Returns a question and its answer, behind the row's system prompt and earlier turns."""
    if not user.strip():
        raise ValueError("the prompt is empty: write one, or leave the row out")
    asked = [*_history(row), {"role": "user", "content": user}]
    answered = [*asked, {"role": "assistant", "content": response}]
    return read_conversation(answered, row.get("tools"), text(row, "system"))


def _with_context(instruction: str, context: str) -> str:
    # The heading is part of the message, so that it reads the same under every chat template.
    return f"{instruction}\n\n### Context:\n{context}" if context.strip() else instruction


def _history(row: dict[str, Any]) -> list[Message]:
    """Returns the earlier turns of a row: pairs of a question and an answer."""
    messages: list[Message] = []
    for pair in parsed(row.get("history"), "history") or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(
                f"history has {pair!r:.60}: expected pairs of question and answer; rename the "
                "column to leave it out"
            )
        turn = dict(zip(("user", "assistant"), pair, strict=True))
        messages += [{"role": role, "content": text(turn, role)} for role in turn]
    return messages


def _alpaca(row: dict[str, Any]) -> Conversation:
    instruction = _with_context(text(row, "instruction"), text(row, "input"))
    return _single(row, instruction, text(row, "output"))


def _openorca(row: dict[str, Any]) -> Conversation:
    row = row | {"system": row.get("system_prompt")}
    return _single(row, text(row, "question"), text(row, "response"))


def _messages(row: dict[str, Any]) -> Conversation:
    tools = row.get("tools") or row.get("functions")
    return read_conversation(row["messages"], tools, text(row, "system"))


def _of_openai(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row whose prompt is a list of messages, where it is OpenAI's request with them."""
    prompt = row.get("prompt")
    if not isinstance(prompt, dict) or not isinstance(prompt.get("messages"), list):
        return row
    if others := [name for name in prompt if name not in ("messages", *_OF_REQUEST, "tools")]:
        raise ValueError(f"prompt is a request with {', '.join(others)}: leave that out")
    return row | {"prompt": prompt["messages"], "tools": row.get("tools") or prompt.get("tools")}


def _prompt_completion(row: dict[str, Any]) -> Conversation:
    row = _of_openai(row)
    for column in ("prompt", "completion"):
        if isinstance(row[column], list) and any(isinstance(one, str) for one in row[column]):
            raise ValueError(
                f"{column} is a list of texts ({row[column]!r:.60}): write one text, or a list of "
                "messages with role and content"
            )
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return _single(row, text(row, "prompt"), text(row, "completion"))
    if _history(row):
        raise ValueError("the row has a history, and messages in prompt or completion: give one")
    before = (
        prompt if isinstance(prompt, list) else [{"role": "user", "content": text(row, "prompt")}]
    )
    after = (
        completion
        if isinstance(completion, list)
        else [{"role": "assistant", "content": completion}]
    )
    messages, system = [*before, *after], text(row, "system")
    found = read_conversation(messages, row.get("tools"), system, first=len(before))
    if not found.answers:
        raise ValueError("the completion has no assistant's message that follows a user's")
    return found


def _xlam(row: dict[str, Any]) -> Conversation:
    query = text(row, "query")
    if not query.strip():
        raise ValueError("the query is empty: write one, or leave the row out")
    asked = {"role": "user", "content": query}
    calls = {"role": "assistant", "tool_calls": row["answers"]}
    return read_conversation([asked, calls], row["tools"])


def _preference(row: dict[str, Any]) -> Conversation:
    """Returns the chosen side of a pair, with the rejected answer; without answers if no pair.

    Sides are texts or messages, with the prompt in front or in a column of its own.
    """
    row = _of_openai(row)
    chosen, rejected = (
        read_conversation(side_messages(row, side), row.get("tools"))
        for side in ("chosen", "rejected")
    )
    same = chosen.messages[:-1] == rejected.messages[:-1]
    last = (len(chosen.messages) - 1) in chosen.answers[-1:]
    if not same or not last or rejected.answers[-1:] != chosen.answers[-1:]:
        return chosen._replace(answers=[])
    return chosen._replace(answers=chosen.answers[-1:], rejected=rejected.messages[-1:])


def _document(row: dict[str, Any]) -> Conversation:
    return Conversation([{"role": DOCUMENT, "content": text(row, "text")}], [0], [])


# name: (columns it needs, columns it may have, row -> conversation)
DATA_FORMATS: dict[
    str, tuple[tuple[str, ...], tuple[str, ...], Callable[[dict[str, Any]], Conversation]]
] = {
    "openorca": (
        ("question", "response"),
        ("system_prompt", "history"),
        _openorca,
    ),
    "dolly": (
        ("instruction", "response"),
        ("context", "system", "history"),
        lambda r: _single(
            r, _with_context(text(r, "instruction"), text(r, "context")), text(r, "response")
        ),
    ),
    "alpaca": (("instruction", "output"), ("input", "system", "history"), _alpaca),
    "gsm8k": (
        ("question", "answer"),
        ("system", "history"),
        lambda r: _single(r, text(r, "question"), text(r, "answer")),
    ),
    "sharegpt": (
        ("conversations",),
        ("system", "tools"),
        lambda r: read_conversation(r["conversations"], r.get("tools"), text(r, "system")),
    ),
    "messages": (("messages",), ("system", "tools", "functions"), _messages),
    "prompt_completion": (
        ("prompt", "completion"),
        ("system", "history", "tools"),
        _prompt_completion,
    ),
    "xlam": (("query", "answers", "tools"), (), _xlam),
    "text": (("text",), (), _document),
    "preference": (("chosen", "rejected"), ("prompt", "tools"), _preference),
}
