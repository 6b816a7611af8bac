"""Which requests the app's server answers: those of the page and its API, none for a file."""

import argparse
import json
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

# Gradio's routes that the page and its API use, without those that read, fetch or take files
_CALLS = (
    "info",
    "openapi.json",
    "queue",
    "run",
    "call",
    "heartbeat",
    "cancel",
    "startup-events",
    "theme.css",
    "app_id",
    "user",
    "login_check",
)
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'"
)
# bytes of a request; JSON takes up to six for a character
BODY = 8 * 2**20
_LOCAL = ("localhost", "127.0.0.1", "[::1]")
AsgiMessage = MutableMapping[str, Any]


class Gate:
    """ASGI middleware that refuses requests the page does not need.

    Its content policy makes the browser refuse requests to other hosts. `local_only` also refuses
    requests under another host's name, which come from a page with a rebound name.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], local_only: bool) -> None:
        self.app = app
        self.local_only = local_only

    async def __call__(
        self,
        scope: AsgiMessage,
        receive: Callable[[], Awaitable[AsgiMessage]],
        send: Callable[[AsgiMessage], Awaitable[None]],
    ) -> None:
        """Pass on an allowed request, and answer 403 to any other."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if not self._allowed(scope):
            await _refuse(send, 403, "not served")
            return
        if scope["method"] == "POST":
            size = dict(scope["headers"]).get(b"content-length", b"")
            if not size.isdigit():
                await _refuse(send, 411, "a request must say its length (Content-Length)")
                return
            if int(size) > BODY:
                await _refuse(send, 413, f"a request may have {BODY:,} bytes, got {int(size):,}")
                return

        async def with_policy(message: AsgiMessage) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", _POLICY.encode())
                message["headers"] = [
                    *message.get("headers", []),
                    policy,
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        await self.app(scope, receive, with_policy)

    def _allowed(self, scope: AsgiMessage) -> bool:
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        if self.local_only and host.rpartition(":")[0] not in _LOCAL and host not in _LOCAL:
            return False
        _, api, call = scope["path"].partition("/gradio_api/")
        return not api or call.split("/")[0] in _CALLS


async def _refuse(send: Callable[[AsgiMessage], Awaitable[None]], status: int, detail: str) -> None:
    """Answer with a status and a sentence, as JSON."""
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    body = json.dumps({"detail": detail}).encode()
    await send({"type": "http.response.body", "body": body})


def accounts(text: str) -> list[tuple[str, str]]:
    """Read USER:PASSWORD, or a file of such lines."""
    lines = Path(text).read_text(encoding="utf-8").splitlines() if Path(text).is_file() else [text]
    pairs = [tuple(line.strip().split(":", 1)) for line in lines if line.strip()]
    if not pairs or not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise argparse.ArgumentTypeError("expected USER:PASSWORD, or a file of such lines")
    return pairs
