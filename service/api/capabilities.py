"""What this service can do, and the schema of what it can be asked."""

from typing import Any

from fastapi import APIRouter

from service.api.deps import ServicesDep
from service.contract.resources import Capabilities
from service.contract.schemas import spec_schema
from service.jobs.capabilities import read_capabilities

router = APIRouter(tags=["capabilities"])


@router.get("/capabilities")
def capabilities(services: ServicesDep) -> Capabilities:
    """Methods, terms, formats, devices, limits, and every reason and error code with its meaning."""
    return read_capabilities(services)


@router.get("/schemas/job")
async def job_schema() -> dict[str, Any]:
    """The JSON Schema of the job spec."""
    return spec_schema()
