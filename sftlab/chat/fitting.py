"""Which of the oldest turns are left out so that a conversation and its reply fit the context?"""

from collections.abc import Callable
from threading import Event

from sftlab.chat.limits import check_size

History = list[dict[str, str]]


def fit(
    history: History,
    context: int,
    max_new_tokens: int,
    prompt_ids: Callable[[History], list[int]],
    token_counts: Callable[[list[str]], list[int]],
    stop: Event | None = None,
) -> tuple[History, int]:
    """Drop the oldest turns until history and reply fit the context.

    Returns the history and the number of dropped turns. A leading system message stays. Every text
    is tokenized once; what their tokens rule out is never put into a template, and the rest is
    halved. Raises ValueError where the conversation is too long to be looked at, where the newest
    message does not fit alone or is not a user's, and once `stop` is set.
    """
    if not history or history[-1]["role"] != "user":
        raise ValueError("the conversation must end with a message of the user")
    check_size(history, context)
    system = history[:1] if history[0]["role"] == "system" else []
    starts = [i for i, message in enumerate(history) if message["role"] == "user"]
    room = context - max_new_tokens

    def prompt(dropped: int) -> tuple[History, int]:
        if stop is not None and stop.is_set():
            raise ValueError("stopped before the answer began")
        kept = system + history[starts[dropped] :] if dropped else history
        return kept, len(prompt_ids(kept))

    sizes = token_counts([message["content"] for message in history])
    low, high = _first_possible(sizes, starts, room), len(starts) - 1
    kept, tokens = prompt(low)
    if tokens <= room:
        return kept, low
    kept, tokens = prompt(high)
    if tokens > room:
        raise ValueError(
            f"the newest message takes {tokens} tokens and the reply up to {max_new_tokens}, but "
            f"the model has {context} positions: shorten it or lower max_new_tokens"
        )
    while high - low > 1:  # low does not fit, high does
        middle = (low + high) // 2
        tried, tokens = prompt(middle)
        low, high, kept = (low, middle, tried) if tokens <= room else (middle, high, kept)
    return kept, high


def _first_possible(sizes: list[int], starts: list[int], room: int) -> int:
    """Returns how many of the oldest turns cannot be kept: their texts alone exceed `room`.

    `sizes` are the tokens of every message. A template may trim texts, and a token may span two, so
    a tenth more is let through, and a token for each message.
    """
    allowed, total, first = room + room // 10 + len(sizes), 0, len(starts) - 1
    ends = [*starts[1:], len(sizes)]
    for turn in range(len(starts) - 1, -1, -1):
        total += sum(sizes[starts[turn] : ends[turn]])
        if total > allowed:
            break
        first = turn
    return first
