"""Jobs: submit, read, list, cancel, retry, delete, and what they tell and produce."""

from contextlib import AsyncExitStack
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from service.api.deps import JobId, OwnerDep, ServicesDep
from service.api.downloads import stored_file_response
from service.api.paging import After, Cursor, Limit, NameFilter, bounded
from service.api.submissions import SUBMIT_BODY, accept, answer, claimed
from service.contract.report import Report
from service.contract.resources import ArtifactPage, AttemptPage, EventPage, JobPage, JobResource, LayerPage
from service.contract.states import JobState
from service.jobs import cancel, delete, read, retry

router = APIRouter(prefix="/jobs", tags=["jobs"])

_STATES = Query(description="Only in this state; may be repeated.")
_MODEL_ID = Query(max_length=100, description="Only of this model.")
_KEY = Header(alias="Idempotency-Key", description="Sent twice with the same request, it starts one job.")
_FROM = Query(alias="from", description="The job's last checkpoint, if one is kept, or the start.")
_DRY_RUN = Query(description="Check the files and the spec and answer 200 with the resolved spec; start nothing.")


@router.post("", status_code=202, response_model=JobResource, openapi_extra=SUBMIT_BODY)
async def submit_job(
    request: Request,
    services: ServicesDep,
    owner: OwnerDep,
    idempotency_key: Annotated[str | None, _KEY] = None,
    dry_run: Annotated[bool, _DRY_RUN] = False,  # noqa: FBT002  (a query parameter)
) -> Response:
    """Start a job, from files sent along (multipart) or uploaded before (JSON)."""
    return await accept(request, services, owner, key=idempotency_key, dry_run=dry_run)


@router.get("")
def list_jobs(
    services: ServicesDep,
    owner: OwnerDep,
    state: Annotated[list[JobState] | None, _STATES] = None,
    model_id: Annotated[str | None, _MODEL_ID] = None,
    name: NameFilter = None,
    cursor: Cursor = None,
    limit: Limit = None,
) -> JobPage:
    """The jobs, newest first."""
    size = bounded(limit, services.settings.page_size, services.settings.max_page_size)
    return read.list_jobs(services, owner, states=state or (), model_id=model_id, name=name, cursor=cursor, limit=size)


@router.get("/{id}", response_model=JobResource)
def read_job(services: ServicesDep, owner: OwnerDep, job_id: JobId) -> Response:
    """One job as it stands now."""
    # Written here, in this thread: FastAPI would take a second one to check what is known to be a JobResource.
    return Response(read.read_job(services, owner, job_id).model_dump_json(), media_type="application/json")


@router.post("/{id}/cancel", status_code=202)
def cancel_job(services: ServicesDep, owner: OwnerDep, job_id: JobId) -> JobResource:
    """Stop the job: at once if it waits, within seconds if it runs. Asking again changes nothing."""
    return cancel.cancel_job(services, owner, job_id)


@router.post("/{id}/retry", status_code=202, response_model=JobResource)
async def retry_job(
    services: ServicesDep,
    owner: OwnerDep,
    job_id: JobId,
    from_: Annotated[Literal["checkpoint", "start"], _FROM] = "checkpoint",
    idempotency_key: Annotated[str | None, _KEY] = None,
) -> Response:
    """Start a new job with the model, dataset and spec of one that failed or was canceled; `retry_of` names it."""
    async with AsyncExitStack() as stack:
        claim = None if idempotency_key is None else claimed(services, owner, idempotency_key)
        key = None if claim is None else await stack.enter_async_context(claim)
        accepted = await run_in_threadpool(
            retry.retry_job, services, owner, job_id, from_start=from_ == "start", key=key
        )
    return answer(accepted.job, replayed=accepted.replayed)


@router.delete("/{id}", status_code=204)
def delete_job(services: ServicesDep, owner: OwnerDep, job_id: JobId) -> None:
    """Delete the job with its history, checkpoints and artifacts; refused until it has ended."""
    delete.delete_job(services, owner, job_id)


@router.get("/{id}/events")
def read_events(
    services: ServicesDep, owner: OwnerDep, job_id: JobId, after: After = 0, limit: Limit = None
) -> EventPage:
    """The job's numbered history; ask again with `after` = `next_after`."""
    size = bounded(limit, services.settings.event_page_size, services.settings.max_event_page_size)
    return read.read_events(services, owner, job_id, after=after, limit=size)


@router.get("/{id}/attempts")
def list_attempts(services: ServicesDep, owner: OwnerDep, job_id: JobId) -> AttemptPage:
    """Who has tried the job, and how each try ended."""
    return read.list_attempts(services, owner, job_id)


@router.get("/{id}/layers")
def read_layers(
    services: ServicesDep,
    owner: OwnerDep,
    job_id: JobId,
    history: bool = False,  # noqa: FBT001, FBT002  (a query parameter)
) -> LayerPage:
    """What each layer becomes and why; with `history` every rank configuration that stood."""
    return read.read_layers(services, owner, job_id, history=history)


@router.get("/{id}/report", response_model=Report)
@router.head("/{id}/report", include_in_schema=False)
def read_report(request: Request, services: ServicesDep, owner: OwnerDep, job_id: JobId) -> Response:
    """What was measured; 404 until the job has succeeded."""
    found = read.find_report(services, owner, job_id)
    return stored_file_response(request, services, found, media_type="application/json", inline=True)


@router.get("/{id}/artifacts")
def list_artifacts(services: ServicesDep, owner: OwnerDep, job_id: JobId) -> ArtifactPage:
    """The files that the job produced."""
    return read.list_artifacts(services, owner, job_id)
