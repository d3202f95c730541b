"""What becomes of leases that nobody prolongs any more."""

from sqlalchemy import ColumnElement, and_, exists, or_, select, update
from sqlalchemy.orm import Session

from service.contract.states import AttemptOutcome, JobState
from service.store.attempts import backoff_seconds, requeue
from service.store.counters import ATTEMPTS_ENDED, LEASE_EXPIRIES, count
from service.store.tables import Attempt, Job
from service.store.time import database_time
from service.store.transitions import cancel_waiting
from service.store.workers import served_queues

BATCH = 100


def expire_leases(
    session: Session, *, grace_seconds: float, retry_base_seconds: float, retry_cap_seconds: float
) -> dict[str, JobState]:
    """End the leases that ran out `grace_seconds` ago or earlier; returns what each job came to.

    Canceled if it was flagged, failed as `WORKER_LOST` if its attempts are used up, else queued with a backoff.
    """
    expired = _release(
        session,
        Job.lease_expires_at < database_time(-grace_seconds),
        "the worker sent no heartbeat until its lease ran out",
        retry_base_seconds,
        retry_cap_seconds,
    )
    if expired:
        count(session, LEASE_EXPIRIES, amount=len(expired))
    return expired


def release_all_leases(session: Session) -> dict[str, JobState]:
    """End every lease at once, without delay: for a start that holds the lock of the data directory.

    Only there is it certain that no other process lives that could own a lease.
    """
    released: dict[str, JobState] = {}
    detail = "the service was ended and started again"
    while batch := _release(session, Job.lease_expires_at.is_not(None), detail, 0, 0):
        released |= batch
    return released


def cancel_flagged(session: Session) -> list[str]:
    """Cancel the jobs that wait with a cancel flag; returns their ids."""
    flagged = select(Job.id).where(Job.state == JobState.QUEUED, Job.cancel_requested_at.is_not(None)).limit(BATCH)
    ids = list(session.scalars(flagged.with_for_update(skip_locked=True)))
    return [job_id for job_id in ids if cancel_waiting(session, job_id)]


def close_lost_attempts(session: Session) -> int:
    """Close attempts that stand open although their job has moved on; returns how many."""
    alive = exists().where(Job.id == Attempt.job_id, Job.lease_epoch == Attempt.epoch, Job.state == JobState.RUNNING)
    stands_open = select(Attempt.id).where(Attempt.ended_at.is_(None), ~alive).limit(BATCH)
    ids = list(session.scalars(stands_open.with_for_update(skip_locked=True)))
    close = update(Attempt).where(Attempt.id.in_(ids)).values(ended_at=database_time(), outcome=AttemptOutcome.LOST)
    if ids:
        session.execute(close)
        count(session, ATTEMPTS_ENDED, AttemptOutcome.LOST, len(ids))
    return len(ids)


def move_stranded(session: Session) -> int:
    """Move waiting jobs of device "auto" whose queue nobody serves, or has lately, to one that is served.

    Those that have not begun go to the GPUs as soon as there are some, where submits put them.
    """
    served = served_queues(session)
    if not served:
        return 0
    any_device = and_(Job.state == JobState.QUEUED, Job.device == "auto", Job.min_gpu_memory_bytes.is_(None))
    best = "gpu" if "gpu" in served else min(served)
    misplaced = or_(Job.queue.not_in(served), and_(Job.queue != best, Job.lease_epoch == 0))
    moving = select(Job.id).where(any_device, misplaced).limit(BATCH).with_for_update(skip_locked=True)
    ids = list(session.scalars(moving))
    if ids:
        session.execute(update(Job).where(Job.id.in_(ids)).values(queue=best))
    return len(ids)


def _release(
    session: Session, condition: ColumnElement[bool], detail: str, base_seconds: float, cap_seconds: float
) -> dict[str, JobState]:
    lost = (
        select(Job.id, Job.lease_epoch, Job.attempt)
        .where(and_(Job.state == JobState.RUNNING, condition))
        .limit(BATCH)
        .with_for_update(skip_locked=True)
    )
    released: dict[str, JobState] = {}
    for job_id, epoch, attempt in session.execute(lost).all():
        state = requeue(
            session,
            job_id,
            epoch,
            outcome=AttemptOutcome.LOST,
            delay_seconds=backoff_seconds(attempt, base_seconds, cap_seconds),
            counted=True,
            detail=detail,
        )
        if state is not None:
            released[job_id] = state
    return released
