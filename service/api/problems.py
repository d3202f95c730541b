"""Every refusal as RFC 9457 `application/problem+json`, whoever raised it."""

from collections.abc import Mapping, Sequence
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Mount

from service.blobs.errors import BlobStoreAwayError
from service.contract.errors import ErrorCode, FieldError, Problem, ProblemError

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 2  # what a client is told to wait when something behind the service is away

_log = structlog.get_logger(__name__)
_READING = ("GET", "HEAD")
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_CODE_OF_STATUS = {
    401: ErrorCode.UNAUTHENTICATED,
    404: ErrorCode.NOT_FOUND,
    405: ErrorCode.METHOD_NOT_ALLOWED,
    413: ErrorCode.TOO_LARGE,
    415: ErrorCode.UNSUPPORTED_MEDIA_TYPE,
    416: ErrorCode.RANGE_NOT_SATISFIABLE,
    503: ErrorCode.UNAVAILABLE,
}


RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}, "description": "A refusal."},
    "5XX": {
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        "description": "The service cannot answer now, or met an error of its own.",
    },
}


class ProblemResponse(Response):
    """A problem on the wire."""

    media_type = MEDIA_TYPE

    def __init__(self, problem: Problem, headers: Mapping[str, str] | None = None) -> None:
        own = {"cache-control": "no-store", **_headers_of(problem.code), **(headers or {})}
        super().__init__(problem.model_dump_json(), status_code=problem.status, headers=own)


def _headers_of(code: ErrorCode) -> dict[str, str]:
    if code is ErrorCode.UNAUTHENTICATED:
        return {"www-authenticate": 'Bearer realm="rankpress"'}
    if code in {ErrorCode.UNAVAILABLE, ErrorCode.IDEMPOTENCY_IN_FLIGHT}:
        return {"retry-after": str(RETRY_AFTER_SECONDS)}
    return {}


def respond(error: ProblemError, request_id: str | None, headers: Mapping[str, str] | None = None) -> ProblemResponse:
    """Render a problem with the id of the request that met it."""
    return ProblemResponse(error.problem(request_id), headers)


def internal(error: Exception, request_id: str | None) -> ProblemResponse:
    """Answer what nobody foresaw: the details go to the log, the request id to the user."""
    _log.error("unexpected error", exc_info=error)
    detail = "the service met an error it did not expect; its log has the details under this request_id"
    return respond(ProblemError(ErrorCode.INTERNAL, detail), request_id)


def install(app: FastAPI, *, unavailable: Sequence[type[Exception]]) -> None:
    """Render all refusals of the application as problems; `unavailable` are the errors of a database that is away."""
    app.add_exception_handler(ProblemError, _on_problem)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(BlobStoreAwayError, _on_blobs_away)
    for kind in unavailable:
        app.add_exception_handler(kind, _on_unavailable)


def request_id_of(request: Request) -> str | None:
    """The id that the outermost layer gave to this request."""
    found: str | None = request.scope.get("state", {}).get("request_id")
    return found


async def _on_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, ProblemError)  # noqa: S101  (registered for this class)
    return respond(error, request_id_of(request), getattr(error, "headers", None))


async def _on_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    errors = [_field_error(detail) for detail in error.errors()]
    first = errors[0]
    problem = ProblemError(ErrorCode.REQUEST_INVALID, f"{first.pointer}: {first.message}", errors=errors)
    return respond(problem, request_id_of(request))


def _field_error(detail: Mapping[str, Any]) -> FieldError:
    pointer = "".join(f"/{part}" for part in detail["loc"])
    found = detail.get("input")
    shown = f"; found {found!r}" if isinstance(found, str | int | float) and len(repr(found)) <= 100 else ""
    return FieldError(pointer=pointer, code=str(detail["type"]), message=f"{detail['msg']}{shown}")


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    code = _CODE_OF_STATUS.get(error.status_code, ErrorCode.REQUEST_INVALID)
    headers = dict(error.headers or {})
    if code is ErrorCode.NOT_FOUND:
        detail = f"there is nothing at {request.url.path}; /docs lists every path"
    elif code is ErrorCode.METHOD_NOT_ALLOWED:
        headers = {"allow": _allowed_methods(request)}
        detail = f"{request.url.path} answers {headers['allow']}; found {request.method}"
    else:
        detail = str(error.detail)
    return respond(ProblemError(code, detail), request_id_of(request), headers)


def _allowed_methods(request: Request) -> str:
    """Every method that the path answers, over all of its routes; the router itself names those of the first one."""
    routes = [route for route in request.app.routes if not isinstance(route, Mount)]
    found = [
        method
        for method in _METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes)
    ]
    return ", ".join(found or ["GET", "HEAD"])  # what no route knows are the static files


async def _on_unavailable(request: Request, error: Exception) -> Response:
    _log.error("database away", error=type(error).__name__, reason=str(error).splitlines()[0][:200])
    if request.method in _READING:
        detail = "the database does not answer now; the same request can be sent again"
    else:  # the answer to a COMMIT may be what was lost
        detail = (
            "the database does not answer now, so this may or may not have been done; send the request again with the "
            "same Idempotency-Key, or, if it had none, look first whether it was"
        )
    return respond(ProblemError(ErrorCode.UNAVAILABLE, detail), request_id_of(request))


async def _on_blobs_away(request: Request, error: Exception) -> Response:
    _log.error("blob store away", reason=str(error))
    detail = "the store of files does not answer now; nothing was accepted, so the same request can be sent again"
    return respond(ProblemError(ErrorCode.UNAVAILABLE, detail), request_id_of(request))
