"""The moves of a job out of `queued` and `running`: each one UPDATE, its event, and the end of its attempt."""

from typing import Any

from sqlalchemy import ColumnElement, and_, case, select, update
from sqlalchemy.orm import Session

from service.contract.errors import Problem
from service.contract.events import EventKind
from service.contract.states import AttemptOutcome, JobState, Phase
from service.store.counters import ATTEMPTS_ENDED, JOBS_ENDED, count
from service.store.events import append_events
from service.store.fence import hold_lease, leased
from service.store.tables import Attempt, Job
from service.store.time import database_time


def cancel_waiting(session: Session, job_id: str) -> bool:
    """`queued → canceled`."""
    waiting = and_(Job.id == job_id, Job.state == JobState.QUEUED)
    return _move(session, job_id, waiting, JobState.CANCELED, {"cancel_requested_at": database_time()})


def fail_waiting(session: Session, job_id: str, problem: Problem) -> bool:
    """`queued → failed`."""
    waiting = and_(Job.id == job_id, Job.state == JobState.QUEUED)
    return _move(session, job_id, waiting, JobState.FAILED, {"problem": problem.model_dump(mode="json")})


def end_running(
    session: Session,
    job_id: str,
    epoch: int,
    state: JobState,
    *,
    outcome: AttemptOutcome,
    detail: str | None = None,
    result: dict[str, Any] | None = None,
    problem: Problem | None = None,
) -> bool:
    """`running → succeeded | failed | canceled`; False when the attempt is not the live one."""
    if not hold_lease(session, job_id, epoch):
        return False
    values: dict[str, Any] = {"run_seconds_used": Job.run_seconds_used + _seconds_run(session, job_id, epoch)}
    if state is JobState.SUCCEEDED:
        values |= {"result": result, "phase": Phase.DONE}
    if problem is not None:
        values["problem"] = problem.model_dump(mode="json")
    _move(session, job_id, leased(job_id, epoch), state, values)
    close_attempt(session, job_id, epoch, outcome, detail)
    return True


def return_to_queue(
    session: Session,
    job_id: str,
    epoch: int,
    *,
    outcome: AttemptOutcome,
    delay_seconds: float,
    counted: bool,
    detail: str | None = None,
) -> bool:
    """`running → queued`; False when the attempt is not the live one. One that is not counted is taken off again."""
    if not hold_lease(session, job_id, epoch):
        return False
    values: dict[str, Any] = {
        "phase": None,
        "not_before": database_time(delay_seconds),
        "run_seconds_used": Job.run_seconds_used + _seconds_run(session, job_id, epoch),
    }
    if not counted:  # after a checkpoint the count stands at 0, and there is nothing to take off
        values["attempt"] = case((Job.attempt > 0, Job.attempt - 1), else_=0)
    _move(session, job_id, leased(job_id, epoch), JobState.QUEUED, values, outcome=outcome, detail=detail)
    close_attempt(session, job_id, epoch, outcome, detail)
    return True


def close_attempt(session: Session, job_id: str, epoch: int, outcome: AttemptOutcome, detail: str | None) -> None:
    """Write how an attempt ended, unless that is written already."""
    opened = and_(Attempt.job_id == job_id, Attempt.epoch == epoch, Attempt.ended_at.is_(None))
    close = update(Attempt).where(opened).values(ended_at=database_time(), outcome=outcome, detail=detail)
    if session.execute(close.returning(Attempt.id)).first() is not None:
        count(session, ATTEMPTS_ENDED, outcome)


def _move(
    session: Session,
    job_id: str,
    where: ColumnElement[bool],
    state: JobState,
    values: dict[str, Any],
    **told: str | None,
) -> bool:
    values = {"state": state, "lease_owner": None, "lease_expires_at": None, **values}
    if state.terminal:
        values["finished_at"] = database_time()
    if session.execute(update(Job).where(where).values(values).returning(Job.id)).first() is None:
        return False
    if state.terminal:
        count(session, JOBS_ENDED, state)
    data = {"state": state, **{name: value for name, value in told.items() if value is not None}}
    return append_events(session, job_id, None, [(EventKind.STATE, data)])


def _seconds_run(session: Session, job_id: str, epoch: int) -> float:
    """How long the attempt has run; a lease that ran out ends it, for nobody knows what came after."""
    query = (
        select(Attempt.started_at, Job.lease_expires_at, database_time())
        .join(Job, Job.id == Attempt.job_id)
        .where(Attempt.job_id == job_id, Attempt.epoch == epoch)
    )
    started, lease_end, now = session.execute(query).one()
    end = now if lease_end is None else min(now, lease_end)
    return max(0.0, float((end - started).total_seconds()))
