"""The outermost layer of every answer: request id, security headers, one log line, and nothing ever unanswered."""

import re
import time
from collections.abc import Callable

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.problems import internal
from service.contract import ids

REQUEST_ID_HEADER = "x-request-id"
UNMATCHED = "unmatched"
CLIENT_CLOSED = 499  # what proxies call a request whose client went away before the answer
_REQUEST_ID = re.compile(r"[A-Za-z0-9._\-]{1,64}")
_SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}
_VERSION_PREFIX = re.compile(r"/v\d+(?=/)")
_QUIET = ("/health/live", "/health/ready", "/metrics")  # asked for every few seconds by machines

_log = structlog.get_logger(__name__)

Observe = Callable[[str, str, int, float], None]


class Edge:
    """Pure ASGI: adds what every answer carries, and answers 500 where the application raised.

    `observe` is told method, route template, status and seconds of each request.
    """

    def __init__(self, app: ASGIApp, *, observe: Observe) -> None:
        self._app = app
        self._observe = observe

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
            finally:
                self._tell(scope, status or CLIENT_CLOSED, time.monotonic() - began)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        route = route_of(scope)
        self._observe(scope["method"], route, status, seconds)
        say = _log.debug if route.endswith(_QUIET) and status < 400 else _log.info
        say(
            "request",
            method=scope["method"],
            path=scope["path"],
            route=route,
            status=status,
            duration_ms=round(seconds * 1000, 1),
            owner=scope["state"].get("owner"),
        )


def route_of(scope: Scope) -> str:
    """The template of the route that served the request: of these there are few, however many ids there are."""
    template: str | None = getattr(scope.get("route"), "path", None)
    if template is None:
        return "/static" if "/static" in scope.get("root_path", "") else UNMATCHED
    prefix = _VERSION_PREFIX.match(scope["path"])  # the template is the one that its router knows, without the prefix
    return f"{prefix[0]}{template}" if prefix and not template.startswith(prefix[0]) else template


def _request_id(scope: Scope) -> str:
    sent = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
    return sent if _REQUEST_ID.fullmatch(sent) else ids.new_id(ids.REQUEST)
