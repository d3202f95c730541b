"""What endpoints are given: the services, the owner that the request speaks for, ids that can exist."""

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from service.contract import ids
from service.contract.errors import ErrorCode, ProblemError
from service.jobs.authentication import Authenticator
from service.jobs.read import not_found
from service.services import Services

_bearer = HTTPBearer(
    auto_error=False,
    scheme_name="key",
    description="RANKPRESS_API_KEY, or the key that the service made and keeps, or one of `rankpress keys add`.",
)


async def get_services(request: Request) -> Services:
    """The services that the application was built with."""
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(get_services)]


async def require_key(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> str:
    """Return the owner whose key the request carries; nothing of its body has been read yet."""
    if credentials is None:
        raise ProblemError(
            ErrorCode.UNAUTHENTICATED, "expected the header 'Authorization: Bearer KEY'; found none: add the key"
        )
    authenticator: Authenticator = request.app.state.authenticator
    key = credentials.credentials.encode("latin-1", "replace").decode("utf-8", "replace")
    known, owner = authenticator.remembered(key)
    if not known:
        owner = await run_in_threadpool(authenticator.owner_of, key)
    if owner is None:
        raise ProblemError(ErrorCode.UNAUTHENTICATED, "the key in 'Authorization: Bearer KEY' is not this service's")
    request.state.owner = owner
    return owner


async def get_owner(request: Request) -> str:
    """The owner that `require_key`, which stands before every route, has found."""
    owner: str = request.state.owner
    return owner


OwnerDep = Annotated[str, Depends(get_owner)]


def _existing_id(prefix: str, what: str) -> Callable[[str], Awaitable[str]]:
    async def check(id: str) -> str:  # noqa: A002  (the path parameter's name on the wire)
        if not ids.is_id(id, prefix):
            raise not_found(what, id)
        return id

    return check


JobId = Annotated[str, Depends(_existing_id(ids.JOB, "job"))]
ModelId = Annotated[str, Depends(_existing_id(ids.MODEL, "model"))]
DatasetId = Annotated[str, Depends(_existing_id(ids.DATASET, "dataset"))]
ArtifactId = Annotated[str, Depends(_existing_id(ids.ARTIFACT, "artifact"))]
