"""Limits on request bodies that hold before any route reads them."""

import asyncio
import contextlib

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.problems import respond
from service.contract.errors import ErrorCode, ProblemError

LINGER_SECONDS = 3.0  # how long a refused sender is listened to, so that it reads the answer and not a reset
LINGER_BYTES = 1024**3


def too_large(limit_bytes: int, what: str) -> ProblemError:
    """The refusal of a body above its limit."""
    return ProblemError(ErrorCode.TOO_LARGE, f"{what} may have at most {limit_bytes} bytes; this one has more")


def declared_length(headers: Headers) -> int | None:
    """The Content-Length, where the request states one that is a number."""
    text = headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


class SmallBodies:
    """Pure ASGI: refuses large bodies on every route that takes no upload."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, upload_paths: frozenset[str]) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._upload_paths = upload_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] in self._upload_paths:
            await self._app(scope, receive, send)
            return
        error = too_large(self._max_bytes, "the body of this request")
        length = declared_length(Headers(scope=scope))
        if length is not None and length > self._max_bytes:
            await respond(error, scope.get("state", {}).get("request_id"))(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise error
            return message

        await self._app(scope, counted, send)


class Linger:
    """Pure ASGI: after an early refusal listens on for a moment before the connection is closed.

    A server that closes while the client still sends makes its kernel reset the connection, and many clients then
    report the reset in place of the answer (RFC 9112, section 9.6).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        no_body = declared_length(headers) in {None, 0} and "transfer-encoding" not in headers
        body_ended = no_body or "expect" in headers  # who waits for 100 Continue has sent nothing yet
        refused = False

        async def watched_receive() -> Message:
            nonlocal body_ended
            message = await receive()
            body_ended = body_ended or not message.get("more_body", False)
            return message

        async def watched_send(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start":
                refused = message["status"] >= 400
            last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if not (last and refused and not body_ended):
                await send(message)
                return
            await send({**message, "more_body": True})
            await _drain(watched_receive)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await self._app(scope, watched_receive, watched_send)


async def _drain(receive: Receive) -> None:
    """Read and drop what still comes, for a bounded time and length."""
    dropped = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while dropped <= LINGER_BYTES:
                message = await receive()
                dropped += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
