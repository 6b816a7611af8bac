"""The messages of one side of a preference pair, from the columns that data sets have."""

import re
from typing import Any

from sftlab.data.messages import ROLES, Message, text

# Anthropic's HH-RLHF writes a conversation as one text
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def side_messages(row: dict[str, Any], side: str) -> list[Message]:
    """Returns the whole conversation of a side, as messages that are not checked yet.

    `side` is chosen or rejected. Raises ValueError where a text has no prompt.
    """
    prompt, answer = row.get("prompt"), row[side]
    if not isinstance(answer, list):
        answer = text(row, side)
        if prompt in (None, "", []):
            return _transcript(answer, side)
        answer = [{"role": "assistant", "content": answer}]
    if prompt in (None, "", []) or any(_role(one) == "user" for one in answer[:1]):
        return answer  # UltraFeedback's sides begin with the prompt
    before = prompt if isinstance(prompt, list) else _prompt_messages(text(row, "prompt"))
    return [*before, *answer]


def _role(message: Any) -> str | None:
    name = message.get("role") or message.get("from") if isinstance(message, dict) else None
    return ROLES.get(name) if isinstance(name, str) else None


def _prompt_messages(prompt: str) -> list[Message]:
    """Returns the messages of a prompt: those of a transcript, or a user's message."""
    turns = _turns(prompt)
    if len(turns) > 1 and turns[-1] == {"role": "assistant", "content": ""}:
        return turns[:-1]
    return [{"role": "user", "content": prompt}]


def _turns(words: str) -> list[Message]:
    start, *parts = _TURN.split(words)
    if start.strip():
        return []
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _SPEAKERS[name], "content": said.strip()} for name, said in pairs]


def _transcript(words: str, side: str) -> list[Message]:
    turns = _turns(words)
    if not turns and words.strip():
        raise ValueError(
            f"there is no prompt, and {side} is neither messages nor a text of turns (Human: ... "
            "Assistant: ...): name the prompt's column with --columns prompt=NAME"
        )
    return turns
