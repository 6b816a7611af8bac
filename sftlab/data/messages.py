"""Messages as chat templates take them, read from the shapes that data have."""

import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle
from typing import Any, NamedTuple

from sftlab.data.tool_calls import read_calls, read_tools

Message = dict[str, Any]  # role, content, and what else a template may write
ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    **dict.fromkeys(("gpt", "assistant", "ai", "bot", "model", "chatgpt", "bing"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    "system": "system",
    # a system message of OpenAI's newer models
    "developer": "system",
    **dict.fromkeys(("tool", "observation", "function", "ipython"), "tool"),
    **dict.fromkeys(("tool_response", "function_response"), "tool"),
}
# roles whose text is the calls as JSON
_CALLS = ("function_call", "tool_call")
# fields of a message that hold its role and its text; the first one there is read
_ROLE, CONTENT = ("from", "role", "speaker"), ("value", "content", "text")
# fields that say whether an answer is trained on
WEIGHTS = ("weight", "train", "trainable", "training", "loss", "loss_weight", "loss_scale")
_OWN = {"from", "role", "value", "content", "tool_calls", "function_call", *WEIGHTS}
# what is left out, and what a row has (row_notes counts both)
EARLY = "message of the assistant before the first user's"
LATE = "message behind the last answer"
UNTRAINED = "with turns of weight 0"
OF_OTHERS = "of a message that is not the assistant's"
OF_A_PART = "of a part of content"
# fields that are not read beside another one
SHADOWED = (
    *(("role", "from"), ("content", "value"), ("function_call", "tool_calls")),
    *(("reasoning", "reasoning_content"), ("thinking", "reasoning_content")),
    ("thinking", "reasoning"),
)


# the role of a document's only message: no template sees it
DOCUMENT = "text"


class Conversation(NamedTuple):
    """Messages, the numbers of those in the loss, and the tools that they may call.

    `notes` name what was left out of them. A document of plain text is one message. Of a preference
    pair, `rejected` is the message in place of the chosen answer; it is empty otherwise.
    """

    messages: list[Message]
    answers: list[int]
    tools: list[dict[str, Any]]
    notes: tuple[str, ...] = ()
    rejected: list[Message] = []

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Conversation":
        """Returns the conversation of a converted row, whose messages and tools are JSON."""
        tools = json.loads(row["tools"]) if row["tools"] else []
        messages, rejected = json.loads(row["messages"]), json.loads(row.get("rejected") or "[]")
        return cls(messages, list(row["answers"]), tools, rejected=rejected)

    def rejected_side(self) -> "Conversation":
        """Returns the conversation of a pair with the rejected answer in the chosen one's place."""
        return Conversation([*self.messages[:-1], *self.rejected], self.answers, self.tools)

    @property
    def is_document(self) -> bool:
        """Whether it is plain text without turns."""
        return bool(self.messages) and self.messages[0]["role"] == DOCUMENT

    def turn(self, answer: int) -> "Conversation":
        """Returns the part that ends with message number `answer`, which alone is in the loss."""
        return Conversation(self.messages[: answer + 1], [answer], self.tools)


def text(row: dict[str, Any], column: str) -> str:
    """Returns a column's text, '' for None. Raises TypeError for anything else."""
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        raise TypeError(
            f"{column} is not text but {type(value).__name__} ({value!r:.60}): write it as "
            f"text, in quotes{', or pass --dataset_text_from_numbers true' * number}"
        )
    return value


def read_conversation(
    given: Any, tools: Any = None, system: str = "", first: int = 0
) -> Conversation:
    """Returns the conversation of a list of messages or texts, or of its JSON text.

    Texts are the user's and the assistant's in turn.

    Its answers are the assistant's messages that follow a user's and have no weight 0; those before
    number `first` are not among them. A blank system message is no message. The assistant's
    messages before the first user's are left out: many templates refuse them. Raises TypeError and
    ValueError for what is no message.
    """
    if isinstance(given, str):
        with suppress(json.JSONDecodeError):
            given = json.loads(given)
    if not isinstance(given, list):
        raise TypeError(
            f"a conversation must be a list of messages, or such a list as JSON text, got "
            f"{type(given).__name__} {given!r:.60}"
        )
    if given and all(isinstance(one, str) for one in given):
        roles = cycle(("user", "assistant"))
        given = [{"role": role, "content": one} for role, one in zip(roles, given, strict=False)]
    messages: list[Message] = [{"content": system, "role": "system"}] if system.strip() else []
    answers: list[int] = []
    notes: dict[str, None] = {}
    asked = False
    for number, one in enumerate(given):
        message = read_message(one, number)
        tools = _tools_with(message.pop("tools", None), tools, number)
        role = message["role"]
        notes |= dict.fromkeys(_unread(one, role))
        asked = asked or role == "user"
        if role == "system" and _is_said(message, messages, system):
            continue
        if role == "assistant" and not asked:
            notes[EARLY] = None
            continue
        if role == "assistant" and not _is_trained(one):
            notes[UNTRAINED] = None
        elif role == "assistant" and number >= first:
            answers.append(len(messages))
        messages.append(message)
    if answers and answers[-1] < len(messages) - 1:
        notes[LATE] = None
    return Conversation(messages, answers, read_tools(tools), tuple(notes))


def _tools_with(found: Any, tools: Any, number: int) -> Any:
    """Returns the tools of a row, which some writers put into a message.

    Raises ValueError where they stand in two places and differ.
    """
    if found and tools and read_tools(found) != read_tools(tools):
        raise ValueError(
            f"message {number} has other tools than stand before it: give a conversation one list "
            "of tools, in the column tools"
        )
    return tools or found


def _is_said(message: Message, before: list[Message], system: str) -> bool:
    """Whether a system message says nothing, or what the system column says already."""
    content = message["content"]
    if content.strip() and system.strip() and content != system and len(before) == 1:
        raise ValueError(
            "the row has a system column and a system message that differ: leave one of them out"
        )
    return not content.strip() or (len(before) == 1 and content == system)


def read_message(given: Any, number: int) -> Message:
    """Returns a message with role, content and all its other fields that hold something.

    Raises TypeError and ValueError for what is no message, an unknown role, and a part that is not
    text.
    """
    if not isinstance(given, dict):
        raise TypeError(f"message {number} has no role and content but is {given!r:.60}")
    read = next((one for one in _ROLE if given.get(one)), None)
    if read is None:
        raise ValueError(
            f"message {number} has no role: it has {', '.join(given)}, and a message needs role or "
            "from, and content or value"
        )
    name = text(given, read).strip().lower()
    if name not in ROLES:
        raise ValueError(f"unknown role {given[read]!r}: known are {', '.join(ROLES)}")
    role = ROLES[name]
    column = next((one for one in CONTENT if given.get(one) is not None), None)
    if column is None and role == "user":
        raise ValueError(
            f"message {number} of the user has no text: it has {', '.join(given)}, and the text "
            "belongs in content or value"
        )
    calls = given.get("tool_calls") or given.get("function_call")
    content = _content(given, column or "content", role, number)
    if name in _CALLS:
        content, calls = "", content
    # in the order of their names, in which they are hashed
    message: Message = {"content": content, "role": role}
    if calls := read_calls(calls):
        message["tool_calls"] = calls
    # a field without a value would be one to a template that asks whether it is there
    return message | {
        field: value
        for field, value in given.items()
        if field not in (*_OWN, read, column) and value not in (None, "", [], {})
    }


def _content(given: dict[str, Any], column: str, role: str, number: int) -> str:
    value = given.get(column)
    if isinstance(value, list) and _are_parts(value):
        return "\n".join(_part(part, number) for part in value)
    if role == "tool" and value is not None and not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return text(given, column)


def _are_parts(value: list[Any]) -> bool:
    return bool(value) and all(
        isinstance(part, str) or (isinstance(part, dict) and "type" in part) for part in value
    )


def _part(part: Any, number: int) -> str:
    if isinstance(part, str):
        return part
    if part["type"] not in ("text", "input_text", "output_text"):
        raise ValueError(
            f"message {number} has a part of type {part['type']!r}: only text is trained on, so "
            "leave the row or the part out"
        )
    return text(part, "text")


def _unread(given: dict[str, Any], role: str) -> Iterator[str]:
    """Yield what a message holds that neither the training nor the template sees."""
    for field in WEIGHTS if role != "assistant" else ():
        if given.get(field):
            yield f"{field} {OF_OTHERS}"
    for left, read in SHADOWED:
        if given.get(left) and given.get(read) and given[left] != given[read]:
            yield f"{left} of a message that has {read} too"
    content = given.get("value") or given.get("content")
    for part in content if isinstance(content, list) and _are_parts(content) else ():
        for key, held in part.items() if isinstance(part, dict) else ():
            if key not in ("type", "text") and held not in (None, "", [], {}):
                yield f"{key} {OF_A_PART}"


def _is_trained(given: dict[str, Any]) -> bool:
    for field in WEIGHTS:
        value = given.get(field)
        if value in (None, ""):
            continue
        if value not in (0, 1):
            raise ValueError(f"{field} is {value!r}: expected 0 or 1, or false or true")
        if not value:
            return False
    return True


def is_empty(answer: Message) -> bool:
    """Whether an answer has neither text nor a tool call."""
    return not answer["content"].strip() and not answer.get("tool_calls")
