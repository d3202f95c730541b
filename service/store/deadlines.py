"""Jobs that wait although their time is over: each fails with what was expected and what was found."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.contract.errors import ErrorCode, Problem, ProblemError
from service.contract.states import JobState
from service.store.tables import Job
from service.store.time import database_time
from service.store.transitions import fail_waiting
from service.store.workers import list_workers

BATCH = 100


def fail_unbegun(session: Session) -> list[str]:
    """Fail the jobs that have not begun by the end of `deadlines.queue_seconds`; returns their ids."""
    late = (
        select(Job.id, Job.queue, Job.created_at, Job.queue_expires_at, database_time().label("now"))
        .where(Job.state == JobState.QUEUED, Job.lease_epoch == 0, Job.queue_expires_at <= database_time())
        .limit(BATCH)
        .with_for_update(skip_locked=True)
    )
    rows = session.execute(late).all()
    if not rows:
        return []
    served = [queue for worker in list_workers(session) for queue in worker.queues]
    failed = []
    for job_id, queue, created_at, expires_at, now in rows:
        expected_seconds = (expires_at - created_at).total_seconds() if expires_at is not None else 0.0
        problem = _unbegun(queue, expected_seconds, (now - created_at).total_seconds(), served.count(queue))
        if fail_waiting(session, job_id, problem):
            failed.append(job_id)
    return failed


def fail_used_up(session: Session) -> list[str]:
    """Fail the jobs whose attempts have used up `deadlines.run_seconds`; returns their ids."""
    used_up = (
        select(Job.id, Job.run_seconds_used, Job.run_seconds_limit)
        .where(Job.state == JobState.QUEUED, Job.run_seconds_used >= Job.run_seconds_limit)
        .limit(BATCH)
        .with_for_update(skip_locked=True)
    )
    return [
        job_id
        for job_id, used, limit in session.execute(used_up).all()
        if fail_waiting(session, job_id, _used_up(used, limit))
    ]


def _unbegun(queue: str, expected_seconds: float, waited_seconds: float, workers: int) -> Problem:
    if workers:
        found = f"which {workers} live worker{'s serve' if workers > 1 else ' serves'}, busy with others"
        change = "add workers or slots, give the job a lower `priority` number, or raise deadlines.queue_seconds"
    else:
        found = "which no live worker serves"
        change = f"start one with `rankpress worker --queue {queue}`, or raise deadlines.queue_seconds"
    return ProblemError(
        ErrorCode.TIMEOUT,
        f"expected the job to begin within deadlines.queue_seconds = {expected_seconds:g} s; it waited "
        f"{waited_seconds:.1f} s in the queue {queue}, {found}: {change}",
    ).problem()


def _used_up(used_seconds: float, limit_seconds: float) -> Problem:
    return ProblemError(
        ErrorCode.TIMEOUT,
        f"expected the job to finish within deadlines.run_seconds = {limit_seconds:g} s; its attempts ran for "
        f"{used_seconds:.1f} s together: raise deadlines.run_seconds, or ask for fewer steps or epochs",
    ).problem()
