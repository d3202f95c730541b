"""Whether the service lives, and whether it can work."""

from fastapi import APIRouter, Response

from service.api.deps import ServicesDep
from service.contract.resources import Health
from service.jobs.readiness import UNAVAILABLE, check_readiness

router = APIRouter(prefix="/health", tags=["health"])


@router.get("/live")
async def live() -> Health:
    """The process answers."""
    return Health(status="live")


@router.get("/ready", responses={503: {"model": Health, "description": "The service cannot take or show jobs."}})
def ready(services: ServicesDep, response: Response) -> Health:
    """Say `ready`, `degraded` (jobs are accepted and wait) or, with 503, `unavailable`; `checks` says why."""
    health = check_readiness(services)
    if health.status == UNAVAILABLE:
        response.status_code = 503
    return health
