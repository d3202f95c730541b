"""The workers, as far as the service has heard of them."""

from typing import Annotated

from fastapi import APIRouter, Query

from service.api.deps import ServicesDep
from service.contract.resources import WorkerPage
from service.jobs import observe

router = APIRouter(prefix="/workers", tags=["workers"])

_INCLUDE_GONE = Query(description="Those too that have stopped or fallen silent.")


@router.get("")
def list_workers(
    services: ServicesDep,
    include_gone: Annotated[bool, _INCLUDE_GONE] = False,  # noqa: FBT002  (a query parameter)
) -> WorkerPage:
    """The processes that run jobs, oldest first."""
    return observe.read_workers(services, include_gone=include_gone)
