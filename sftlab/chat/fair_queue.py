"""Gradio's queue, shared fairly: a client has its share, and a wrong call a clear answer."""

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, get_type_hints

Answer = tuple[bool, Any, str]
Push = Callable[..., Awaitable[Answer]]


class Shares(NamedTuple):
    """How many messages of one page, and of one client, may wait or be answered."""

    page: int
    client: int


def shares_of(queue_size: int) -> Shares:
    """Returns a quarter of the queue for a page, and three quarters for a client."""
    return Shares(max(2, queue_size // 4), max(2, 3 * queue_size // 4))


def share_queue(queue: Any, concurrency_id: str, shares: Shares, events: type) -> None:
    """Let `queue` (gradio's) refuse calls beyond `shares`, and calls of another form.

    A client is an account, or without accounts an address. Several people may be behind one
    address, so an open page has a share of its own. A client can pretend to be many pages, so all
    of a client's pages have one too. `concurrency_id` names the calls that wait for the model;
    others are not counted. `events` is gradio's class of what a page tells of an event.
    """
    push: Push = queue.push

    async def checked(body: Any, request: Any, username: str | None) -> Answer:
        functions = queue.blocks.fns
        if body.fn_index not in functions:
            return False, f"fn_index {body.fn_index} names no function of this page", "error"
        function = functions[body.fn_index]
        if fault := _fault(function, body.data, body.event_data, events):
            return False, f"{function.api_name or 'this function'} takes {fault}", "error"
        if function.concurrency_id == concurrency_id:
            mine = _client(request, username)
            waiting = [
                event
                for event in _events(queue, concurrency_id)
                if _client(event.request, event.username) == mine
            ]
            of_page = [event for event in waiting if event.session_hash == body.session_hash]
            counted = (("page", of_page, shares.page), ("client", waiting, shares.client))
            for name, calls, share in counted:
                if len(calls) >= share:
                    said = f"Queue is full for you: {len(calls)} of your messages wait already"
                    said += f", and a {name} may have {share}. Try again later."
                    return False, said, "queue_full"
        return await push(body=body, request=request, username=username)

    queue.push = checked


def _fault(function: Any, data: list[Any], event_data: Any, events: type) -> str | None:
    """Returns what a call should have given, and what it gave instead; None for a right call."""
    if len(data) != len(function.inputs):
        return f"{len(function.inputs)} values in data, got {len(data)}"
    for kind in get_type_hints(function.fn).values() if inspect.isroutine(function.fn) else ():
        if inspect.isclass(kind) and issubclass(kind, events):
            # gradio reads the page's event only when the call is run, and answers with a KeyError
            try:
                kind(None, event_data)
            except KeyError as missing:
                return f"{missing.args[0]} in event_data, got none"
            except TypeError:
                return f"an object as event_data, got {type(event_data).__name__}"
    return None


def _events(queue: Any, concurrency_id: str) -> list[Any]:
    """Returns the calls that wait for the model or are being answered."""
    waiting = queue.event_queue_per_concurrency_id.get(concurrency_id)
    active = [event for job in queue.active_jobs for event in job or []]
    running = [event for event in active if event.concurrency_id == concurrency_id]
    return [*(waiting.queue if waiting else []), *running]


def _client(request: Any, username: str | None) -> str:
    if username:
        return f"account {username}"
    return request.client.host if request.client else "unknown"
