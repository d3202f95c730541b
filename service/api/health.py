"""Whether the service lives, and whether it can work."""

import anyio
from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response

from service.contract.resources import Health
from service.jobs.readiness import UNAVAILABLE, Readiness

LOOKERS = 8  # health and metrics have threads of their own: those of other requests may all wait for the database

router = APIRouter(prefix="/health", tags=["health"])


def make_limiter() -> anyio.CapacityLimiter:
    """The threads of those who look at the service."""
    return anyio.CapacityLimiter(LOOKERS)


@router.get("/live")
async def live() -> Health:
    """The process answers."""
    return Health(status="live")


@router.get("/ready", responses={503: {"model": Health, "description": "The service cannot take or show jobs."}})
async def ready(request: Request, response: Response) -> Health:
    """Say `ready`, `degraded` (jobs are accepted and wait) or, with 503, `unavailable`; `checks` says why."""
    readiness: Readiness = request.app.state.readiness
    health = await run_sync(readiness.check, limiter=request.app.state.lookers)
    if health.status == UNAVAILABLE:
        response.status_code = 503
    return health
