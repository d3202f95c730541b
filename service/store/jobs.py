"""Jobs as their owners see them: insert, read, list, cancel."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, Row, bindparam, case, func, insert, select, tuple_, update
from sqlalchemy.orm import Session, aliased

from service.contract.errors import Problem
from service.contract.events import EventKind, Progress
from service.contract.resources import JobResource, ResultSummary
from service.contract.states import JobState
from service.store.counters import JOBS_SUBMITTED, count
from service.store.events import append_events
from service.store.fence import waiting
from service.store.tables import Job
from service.store.time import database_time
from service.store.transitions import cancel_waiting

PLACES_MAX = 1000  # places in a queue are counted up to here: what is asked for so often must not grow with the queue


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """What is known of a job when it is accepted."""

    id: str
    owner: str
    model_id: str
    dataset_id: str | None
    objective_model_id: str | None = None  # the module of its loss
    requested_spec: dict[str, Any]  # as the user wrote it
    spec: dict[str, Any]  # with every default filled in
    spec_sha256: str
    queue: str
    max_attempts: int
    run_seconds_limit: float  # over all attempts together
    name: str | None = None
    priority: int = 0  # lower runs first
    device: str = "auto"  # as asked for
    min_gpu_memory_bytes: int | None = None
    retry_of: str | None = None
    queue_seconds: float | None = None  # how long it may wait for its first attempt


class CancelOutcome(StrEnum):
    """What asking for a cancel came to."""

    CANCELED = "canceled"  # it is canceled now, or was before
    REQUESTED = "requested"  # it runs; its worker sees the flag with its next heartbeat
    FINISHED = "finished"  # it succeeded or failed before; nothing was changed
    NOT_FOUND = "not_found"


def insert_job(session: Session, job: NewJob) -> None:
    """Write the job and its first event.

    The promise stands once the caller's transaction is committed: answer only after that.
    """
    values = {**vars(job), "state": JobState.QUEUED}
    seconds = values.pop("queue_seconds")
    session.execute(insert(Job).values(queue_expires_at=None if seconds is None else database_time(seconds), **values))
    count(session, JOBS_SUBMITTED)
    append_events(session, job.id, None, [(EventKind.STATE, {"state": JobState.QUEUED})])


def get_job(session: Session, job_id: str, owner: str | None) -> Job | None:
    """The job's row, if it is the owner's; `owner=None` reads for the service itself."""
    query = select(Job).where(Job.id == job_id)
    if owner is not None:
        query = query.where(Job.owner == owner)
    return session.scalars(query).one_or_none()


def list_jobs(
    session: Session,
    owner: str,
    *,
    states: Collection[str] = (),
    model_id: str | None = None,
    name: str | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> tuple[list[Job], str | None]:
    """A page of the owner's jobs, newest first, and the cursor of the next page (None on the last)."""
    query = select(Job).where(Job.owner == owner).order_by(Job.id.desc()).limit(limit + 1)
    if states:
        query = query.where(Job.state.in_(states))
    if model_id is not None:
        query = query.where(Job.model_id == model_id)
    if name is not None:
        query = query.where(Job.name == name)
    if cursor is not None:
        query = query.where(Job.id < cursor)
    rows = list(session.scalars(query))
    return rows[:limit], rows[limit - 1].id if len(rows) > limit else None


def queue_positions(session: Session, rows: Iterable[Job]) -> dict[str, int]:
    """The place of each waiting job in its queue, 1 being the next; those that do not wait are left out.

    So are those after the first `PLACES_MAX` of their queue: a page costs the same however many jobs wait.
    """
    queued = [row for row in rows if row.state == JobState.QUEUED]
    places: dict[str, int] = {}
    for queue in {row.queue for row in queued}:
        order = (Job.priority, Job.created_at, Job.id)
        head = select(*order).where(Job.queue == queue, waiting()).order_by(*order).limit(PLACES_MAX).subquery()
        place = func.row_number().over(order_by=(head.c.priority, head.c.created_at, head.c.id)).label("place")
        numbered = select(head.c.id, place).subquery()
        asked = numbered.c.id.in_([row.id for row in queued if row.queue == queue])
        places |= {row.id: row.place for row in session.execute(select(numbered.c.id, numbered.c.place).where(asked))}
    return places


def queue_position(session: Session, row: Job) -> int | None:
    """The place of one job in its queue, 1 being the next; None if it does not wait, or is beyond `PLACES_MAX`."""
    if row.state != JobState.QUEUED:
        return None
    return session.execute(_PLACE, {"job_id": row.id}).scalar_one_or_none()


def _place() -> ColumnElement[int | None]:
    """How many jobs at the head of the same queue come no later than this one.

    The head is cut off before it is compared: SQLite walks an index by the first column of a comparison of rows alone.
    """
    other = aliased(Job)
    order = (other.priority, other.created_at, other.id)
    first = select(*order).where(other.queue == Job.queue, waiting(other)).order_by(*order).limit(PLACES_MAX + 1)
    head = first.correlate(Job).subquery()
    no_later = tuple_(head.c.priority, head.c.created_at, head.c.id) <= tuple_(Job.priority, Job.created_at, Job.id)
    counted = select(func.count()).select_from(head).where(no_later).correlate(Job).scalar_subquery()
    return func.nullif(counted, PLACES_MAX + 1)


_PLACE = select(_place()).where(Job.id == bindparam("job_id"), waiting())
# Asked for more often than anything else, by everybody who waits for a job: built once, and without objects.
_READ = select(*Job.__table__.columns, case((waiting(), _place())).label("place")).where(
    Job.id == bindparam("job_id"), Job.owner == bindparam("owner")
)


def read_job(session: Session, job_id: str, owner: str) -> JobResource | None:
    """The owner's job with its place in the queue, by one statement."""
    row = session.connection().execute(_READ, {"job_id": job_id, "owner": owner}).one_or_none()
    return None if row is None else job_resource(row, row.place)


def count_jobs(session: Session) -> dict[str, int]:
    """How many jobs stand in each state."""
    counted = session.execute(select(Job.state, func.count().label("jobs")).group_by(Job.state))
    return dict.fromkeys(JobState, 0) | {row.state: row.jobs for row in counted}


def request_cancel(session: Session, job_id: str, owner: str | None) -> CancelOutcome:
    """Cancel a waiting job right there, or flag a running one; asking again changes nothing."""
    query = select(Job.state, Job.cancel_requested_at).where(Job.id == job_id).with_for_update()
    if owner is not None:
        query = query.where(Job.owner == owner)
    row = session.execute(query).one_or_none()
    if row is None:
        return CancelOutcome.NOT_FOUND
    if row.state == JobState.QUEUED:
        cancel_waiting(session, job_id)
        return CancelOutcome.CANCELED
    if row.state == JobState.RUNNING:
        if row.cancel_requested_at is None:
            session.execute(update(Job).where(Job.id == job_id).values(cancel_requested_at=database_time()))
            append_events(session, job_id, None, [(EventKind.LOG, {"level": "info", "message": "cancel requested"})])
        return CancelOutcome.REQUESTED
    return CancelOutcome.CANCELED if row.state == JobState.CANCELED else CancelOutcome.FINISHED


def job_resource(row: Job | Row[*tuple[Any, ...]], position: int | None) -> JobResource:
    """The job as it stands on the wire; `attempt` there is the number of tries begun."""
    return JobResource(
        id=row.id,
        name=row.name,
        state=JobState(row.state),
        phase=row.phase,
        queue=row.queue,
        priority=row.priority,
        retry_of=row.retry_of,
        progress=Progress.model_validate(row.progress),
        queue_position=position,
        cancel_requested=row.cancel_requested_at is not None,
        attempt=row.lease_epoch,
        model_id=row.model_id,
        dataset_id=row.dataset_id,
        objective_model_id=row.objective_model_id,
        requested_spec=row.requested_spec,
        spec=row.spec,
        result=None if row.result is None else ResultSummary.model_validate(row.result),
        problem=None if row.problem is None else Problem.model_validate(row.problem),
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )
