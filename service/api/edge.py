"""The outermost layer of every answer: request id, security headers, one log line, and nothing ever unanswered."""

import re
import time

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.problems import internal
from service.contract import ids

REQUEST_ID_HEADER = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._\-]{1,64}")
_SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}

_log = structlog.get_logger("rankpress.http")


class Edge:
    """Pure ASGI: adds what every answer carries, and answers 500 where the application raised."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        began = time.monotonic()
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = request_id
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_headers)
            except ClientDisconnect:
                _log.info("client went away", method=scope["method"], path=scope["path"])
            except Exception as error:
                if status:  # the answer has begun: closing the connection is all that is left to say
                    raise
                await internal(error, request_id)(scope, receive, send_with_headers)
            milliseconds = round((time.monotonic() - began) * 1000, 1)
            _log.info("request", method=scope["method"], path=scope["path"], status=status, duration_ms=milliseconds)


def _request_id(scope: Scope) -> str:
    sent = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
    return sent if _REQUEST_ID.fullmatch(sent) else ids.new_id(ids.REQUEST)
