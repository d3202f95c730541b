"""What the store can say of the service's work as a whole: queues, running jobs, workers, counters."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import and_, case, func, select
from sqlalchemy.orm import Session

from service.contract.states import JobState
from service.store.counters import read_counters
from service.store.tables import Attempt, Checkpoint, Job
from service.store.time import database_time
from service.store.workers import list_workers


@dataclass
class QueueFigures:
    """One queue, and the workers that serve it; a worker of two queues counts for both."""

    claimable: int = 0
    backing_off: int = 0  # waiting until a time that has not come yet
    oldest_age_seconds: float = 0.0  # how long the first of the claimable jobs has been so
    running: int = 0
    checkpoint_age_seconds: float = 0.0  # the most that a running job would lose, were it killed now
    workers: int = 0
    slots: int = 0
    busy: int = 0


@dataclass(frozen=True)
class StoreFigures:
    """All of it, at one time."""

    queues: Mapping[str, QueueFigures]
    jobs: Mapping[str, int]  # by state
    counters: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def read_figures(session: Session) -> StoreFigures:
    """Everything that is exported, in a handful of queries."""
    queues: dict[str, QueueFigures] = {}
    jobs = _count_jobs(session, queues)
    _find_checkpoint_ages(session, queues)
    for worker in list_workers(session):
        for name in worker.queues:
            queue = queues.setdefault(name, QueueFigures())
            queue.workers += 1
            queue.slots += worker.slots
            queue.busy += worker.busy
    return StoreFigures(queues, jobs, read_counters(session))


def waiting_by_queue(session: Session) -> dict[str, int]:
    """How many jobs wait in each queue, those that back off among them."""
    waiting = select(Job.queue, func.count().label("jobs")).where(Job.state == JobState.QUEUED).group_by(Job.queue)
    return {row.queue: row.jobs for row in session.execute(waiting)}


def _count_jobs(session: Session, queues: dict[str, QueueFigures]) -> dict[str, int]:
    ready = and_(Job.state == JobState.QUEUED, Job.not_before <= database_time())
    counted = select(
        Job.queue,
        Job.state,
        func.count().label("jobs"),
        func.count(case((ready, 1))).label("ready"),
        func.min(case((ready, Job.not_before))).label("since"),
        database_time().label("now"),
    ).group_by(Job.queue, Job.state)
    states = dict.fromkeys(map(str, JobState), 0)
    for row in session.execute(counted):
        states[row.state] = states.get(row.state, 0) + row.jobs
        queue = queues.setdefault(row.queue, QueueFigures())
        if row.state == JobState.QUEUED:
            queue.claimable, queue.backing_off = row.ready, row.jobs - row.ready
            queue.oldest_age_seconds = _seconds(row.since, row.now)
        elif row.state == JobState.RUNNING:
            queue.running = row.jobs
    return states


def _find_checkpoint_ages(session: Session, queues: dict[str, QueueFigures]) -> None:
    """Of each running job the time since its newest checkpoint, or since its attempt began if that is later."""
    newest = (
        select(Job.queue, func.max(Attempt.started_at).label("began"), func.max(Checkpoint.created_at).label("kept"))
        .join(Attempt, and_(Attempt.job_id == Job.id, Attempt.epoch == Job.lease_epoch))
        .outerjoin(Checkpoint, Checkpoint.job_id == Job.id)
        .where(Job.state == JobState.RUNNING)
        .group_by(Job.id, Job.queue)
    )
    rows = session.execute(newest).all()
    now = session.execute(select(database_time())).scalar_one()
    for row in rows:
        queue = queues.setdefault(row.queue, QueueFigures())
        since = row.began if row.kept is None else max(row.began, row.kept)
        queue.checkpoint_age_seconds = max(queue.checkpoint_age_seconds, _seconds(since, now))


def _seconds(since: datetime | None, now: datetime) -> float:
    return 0.0 if since is None else max(0.0, (now - since).total_seconds())
