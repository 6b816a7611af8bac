"""What a chat template makes of fixed conversations, and what it reads from outside of them."""

import hashlib
import json
import re
from collections.abc import Iterable
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from sftlab.data.chat_template import template_hash
from sftlab.data.template_errors import LIMIT_S, TEMPLATE_ERRORS, is_of_template
from sftlab.data.time_limit import time_limit
from sftlab.exit_messages import first_line

# two times of one day, and another day
_TIMES = (
    datetime(2001, 2, 3, 4, 5, 6),
    datetime(2001, 2, 3, 17, 48, 59),
    datetime(2012, 11, 28, 4, 5, 6),
)
USER, ANSWER = "Name the zebra.", "It is Quagga."
SYSTEM, EARLIER = "Speak like a walrus.", "Fine weather."
REASONING = "Stripes were counted."
CLOCK = {"type": "function", "function": {"name": "clock_of", "description": "", "parameters": {}}}
_QUESTION = {"role": "user", "content": USER}
# name: messages before an answer. The words are told from those of any template.
PROBES: dict[str, list[dict[str, str]]] = {
    "a question": [_QUESTION],
    "system prompts": [{"role": "system", "content": SYSTEM}, _QUESTION],
    "earlier turns": [
        {"role": "user", "content": "How are you?"},
        {"role": "assistant", "content": EARLIER},
        _QUESTION,
    ],
}
THOUGHTFUL = f"<think>\n{REASONING}\n</think>\n\n{ANSWER}"
# fields of an answer that some templates write
_FIELDS: dict[str, Any] = {
    "reasoning_content": REASONING,
    "reasoning": REASONING,
    "thinking": REASONING,
    "tool_calls": [{"type": "function", "function": {"name": "clock_of", "arguments": {}}}],
}
# for templates that take arguments as JSON text alone
_TEXT_CALLS = [{"type": "function", "function": {"name": "clock_of", "arguments": "{}"}}]
# a field that no list here names
_ANY = "Zebu."


def template_facts(
    tokenizer: PreTrainedTokenizerBase, source: str, fields: Iterable[str] = ()
) -> dict[str, Any]:
    """Returns what must not change between starts of a run: template, rendered probes, day.

    `writes` names the fields of messages, among the known ones and `fields`, that the template
    writes, and whether it writes tools. Raises ValueError for a template that is not valid, reads
    the time of day, draws at random, or takes too long.
    """
    facts = {"source": source, "hash": template_hash(tokenizer)} | rendered_facts(tokenizer)
    return facts | {"writes": fields_written(tokenizer, fields)}


def rendered_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Returns `rendered`, a hash of the rendered probes, and `day` where the template reads it."""
    template = tokenizer.get_chat_template()
    if found := re.search(r"\blipsum\b|\|\s*random\b", template):
        raise ValueError(
            f"the chat template draws at random ({found[0]}), so no row would be trained on twice "
            "alike: give another with --chat_template_path"
        )
    with time_limit(LIMIT_S, "rendering a conversation with the chat template"):
        now = _rendered(tokenizer)
        morning, evening, other = (_rendered_at(tokenizer, when) for when in _TIMES)
    if morning != evening:
        raise ValueError(
            "the chat template writes the time of day, so rows would differ from one another: give "
            "a copy without it with --chat_template_path"
        )
    day = {"day": chat_template_utils.datetime.now().date().isoformat()} if morning != other else {}
    return day | {"rendered": hashlib.sha256(json.dumps(now).encode()).hexdigest()[:16]}


def write_day(day: str | None) -> None:
    """Let chat templates write this day (ISO 8601) instead of today's; None: today's again.

    Raises ValueError for a text that is no day.
    """
    # transformers' strftime_now asks this name, and takes no function in its place
    now = None if day is None else datetime.fromisoformat(day)
    chat_template_utils.datetime = SimpleNamespace(now=lambda: now) if now else datetime


def _rendered_at(tokenizer: PreTrainedTokenizerBase, when: datetime) -> list[str]:
    """Returns the rendered probes as they would be at another time."""
    # transformers' strftime_now asks this name, and takes no function in its place
    real = chat_template_utils.datetime
    chat_template_utils.datetime = SimpleNamespace(now=lambda: when)
    try:
        return _rendered(tokenizer)
    finally:
        chat_template_utils.datetime = real


def _rendered(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    answer = {"role": "assistant", "content": ANSWER}
    return [
        _render(tokenizer, conversation, add_generation_prompt=asked)
        for before in PROBES.values()
        for conversation, asked in ((before, True), ([*before, answer], False))
    ]


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Any], **kwargs: Any) -> str:
    """Returns the text of a conversation, or the template's reason for refusing it."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    except TEMPLATE_ERRORS as error:
        if not is_of_template(error):
            raise
        return f"refused: {first_line(error)}"


def fields_written(tokenizer: PreTrainedTokenizerBase, fields: Iterable[str]) -> list[str]:
    """Returns which of the known fields and `fields` the template writes, and `tools`."""
    answer = {"role": "assistant", "content": ANSWER}
    call = answer | {"tool_calls": _FIELDS["tool_calls"]}
    result = {"role": "tool", "content": "Nine."}
    # a field may be the answer's or the result's of a tool
    chats = [[_QUESTION, answer], [_QUESTION, call, result]]
    plain = [_render(tokenizer, chat) for chat in chats]
    found = []
    for name in dict.fromkeys([*_FIELDS, *fields]):
        values = [_FIELDS.get(name, _ANY), *([_TEXT_CALLS] if name == "tool_calls" else [])]
        with_it = [[*chat[:-1], chat[-1] | {name: one}] for one in values for chat in chats]
        found_in = (_render(tokenizer, chat) for chat in with_it)
        if any(map(_differs, plain * len(values), found_in)):
            found.append(name)
    if "tools" not in found and _differs(plain[0], _render(tokenizer, chats[0], tools=[CLOCK])):
        found.append("tools")
    return found


def _differs(plain: str, other: str) -> bool:
    return other != plain and not other.startswith("refused: ")
