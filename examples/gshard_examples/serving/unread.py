"""Requests that are answered before their body was read to its end."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class CloseUnread:
    """Closes a connection whose request was answered before all of it had come.

    Too large a body, one that is too slow, or one that was sent where none is read:
    kept open, the connection would have to be read for as long as the client likes to
    send, to find where its next request begins. Such an answer has `connection: close`.

    The answer goes out at once; then what the client is still sending is thrown away
    for a moment, for a system that closes a connection with unread bytes resets it,
    and the client may lose the answer.

    Args:
        app: The application.
        most_bytes: That are thrown away before the connection is closed.
        seconds: For which they are, at most.
    """

    def __init__(self, app: ASGIApp, most_bytes: int, seconds: float = 1.0):
        self.app = app
        self.most_bytes = most_bytes
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, as ASGI says."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_read = not _has_body(scope)
        closes = False

        async def tracked_receive() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = is_read or not message.get("more_body", False)
            return message

        async def closing_send(message: Message) -> None:
            nonlocal closes
            if message["type"] == "http.response.start" and not is_read:
                closes = True
                headers = [*message["headers"], (b"connection", b"close")]
                message = {**message, "headers": headers}
            is_last = message["type"] == "http.response.body" and not message.get(
                "more_body", False
            )
            if not (closes and is_last):
                await send(message)
                return
            await send({**message, "more_body": True})
            await self._throw_away(receive)
            await send({"type": "http.response.body", "body": b""})

        await self.app(scope, tracked_receive, closing_send)

    async def _throw_away(self, receive: Receive) -> None:
        thrown = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.seconds):
                while thrown <= self.most_bytes:
                    message = await receive()
                    thrown += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return


def _has_body(scope: Scope) -> bool:
    headers = Request(scope).headers
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
