"""What an owner can see of jobs, and of what they produced; another owner's job is not there."""

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy.orm import Session

from service.contract import ids
from service.contract.errors import ErrorCode, FieldError, ProblemError
from service.contract.resources import (
    ArtifactPage,
    ArtifactResource,
    AttemptPage,
    EventPage,
    JobPage,
    JobResource,
    LayerPage,
)
from service.contract.states import JobState
from service.services import Services
from service.store import artifacts, attempts, events, jobs, layers, ranks
from service.store.tables import Artifact, Job

REPORT_FORMAT = "report"


@dataclass(frozen=True)
class StoredFile:
    """An artifact with the place of its bytes."""

    resource: ArtifactResource
    blob_key: str


def not_found(what: str, id_: str) -> ProblemError:
    """The refusal for an id that is unknown, cannot exist or is another owner's: the three look alike."""
    shown = id_ if id_.isprintable() and len(id_) <= 100 else f"{id_[:40]!r}…"
    return ProblemError(ErrorCode.NOT_FOUND, f"there is no {what} {shown}")


def checked_cursor(cursor: str | None, prefix: str) -> str | None:
    """Refuse a cursor that no page can have given."""
    if cursor is not None and not ids.is_id(cursor, prefix):
        message = "expected the next_cursor of an earlier page; found something else: begin without a cursor"
        raise ProblemError(
            ErrorCode.REQUEST_INVALID,
            f"/query/cursor: {message}",
            errors=[FieldError(pointer="/query/cursor", code="cursor", message=message)],
        )
    return cursor


def read_job(services: Services, owner: str, job_id: str) -> JobResource:
    """The job as it stands now."""
    with services.database.read() as session:
        found = jobs.read_job(session, job_id, owner)
    if found is None:
        raise not_found("job", job_id)
    return found


def list_jobs(
    services: Services,
    owner: str,
    *,
    states: Collection[JobState] = (),
    model_id: str | None = None,
    name: str | None = None,
    cursor: str | None = None,
    limit: int,
) -> JobPage:
    """A page of the owner's jobs, newest first."""
    checked_cursor(cursor, ids.JOB)
    if model_id is not None and not ids.is_id(model_id, ids.MODEL):
        return JobPage(items=[], next_cursor=None)
    with services.database.read() as session:
        rows, next_cursor = jobs.list_jobs(
            session, owner, states=states, model_id=model_id, name=name, cursor=cursor, limit=limit
        )
        places = jobs.queue_positions(session, rows)
        return JobPage(items=[jobs.job_resource(row, places.get(row.id)) for row in rows], next_cursor=next_cursor)


def read_events(services: Services, owner: str, job_id: str, *, after: int, limit: int) -> EventPage:
    """The job's history after an event; asking again with `next_after` goes on where this page ends."""
    with services.database.read() as session:
        existing_job(session, owner, job_id)
        found = events.list_events(session, job_id, after, limit)
        return EventPage(items=found, next_after=found[-1].id if found else after)


def read_layers(services: Services, owner: str, job_id: str, *, history: bool) -> LayerPage:
    """The layer plan as it stands; empty until the census of the model is done."""
    with services.database.read() as session:
        existing_job(session, owner, job_id)
        plan = layers.layer_plan(session, job_id)
        return LayerPage(items=plan, history=ranks.rank_history(session, job_id) if history else None)


def list_artifacts(services: Services, owner: str, job_id: str) -> ArtifactPage:
    """The files that the job produced."""
    with services.database.read() as session:
        existing_job(session, owner, job_id)
        rows = artifacts.list_artifacts(session, job_id)
        return ArtifactPage(items=[artifacts.artifact_resource(row) for row in rows])


def list_attempts(services: Services, owner: str, job_id: str) -> AttemptPage:
    """Who has tried the job, and how each try ended."""
    with services.database.read() as session:
        existing_job(session, owner, job_id)
        return AttemptPage(items=attempts.list_attempts(session, job_id))


def find_artifact(services: Services, owner: str, artifact_id: str) -> StoredFile:
    """One file that a job produced."""
    with services.database.read() as session:
        row = artifacts.get_artifact(session, artifact_id, owner)
        if row is None:
            raise not_found("artifact", artifact_id)
        return _stored(row)


def find_report(services: Services, owner: str, job_id: str) -> StoredFile:
    """The job's report, once it has one."""
    with services.database.read() as session:
        job = existing_job(session, owner, job_id)
        for row in artifacts.list_artifacts(session, job_id):
            if row.format == REPORT_FORMAT:
                return _stored(row)
    if job.state == JobState.SUCCEEDED:
        raise ProblemError(ErrorCode.NOT_FOUND, f"the report of job {job_id} was deleted")
    raise ProblemError(
        ErrorCode.NOT_FOUND, f"job {job_id} has no report: it is {job.state}, and a report is made when a job succeeds"
    )


def existing_job(session: Session, owner: str, job_id: str) -> Job:
    """The owner's job, or `NOT_FOUND`."""
    row = jobs.get_job(session, job_id, owner)
    if row is None:
        raise not_found("job", job_id)
    return row


def _stored(row: Artifact) -> StoredFile:
    return StoredFile(artifacts.artifact_resource(row), row.blob_key)
