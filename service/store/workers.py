"""The processes that can run jobs, as far as they have been heard of."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, or_, select, update
from sqlalchemy.orm import Session

from service.store.tables import Worker
from service.store.time import database_time
from service.store.upserts import insert_if_absent

SERVED_SECONDS = 300.0  # a worker that is started again, or a machine, is back by then


def register_worker(
    session: Session,
    worker_id: str,
    *,
    host: str,
    pid: int,
    queues: Sequence[str],
    slots: int,
    version: str = "",
    devices: dict[str, Any] | None = None,
) -> None:
    """Make a worker known; ids are made with `new_id(WORKER)`, one for each start. Doing it again is harmless."""
    values = {
        "id": worker_id,
        "host": host,
        "pid": pid,
        "queues": list(queues),
        "slots": slots,
        "version": version,
        "devices": devices or {},
    }
    insert_if_absent(session, Worker, values)


def beat_worker(session: Session, worker_id: str, busy: int) -> bool:
    """Say that the worker lives and how many slots are taken; False if it was never registered."""
    beat = update(Worker).where(Worker.id == worker_id).values(busy=busy, last_seen_at=database_time(), gone_at=None)
    return session.execute(beat.returning(Worker.id)).first() is not None


def retire_worker(session: Session, worker_id: str) -> None:
    """Note that the worker has stopped in good order."""
    session.execute(update(Worker).where(Worker.id == worker_id).values(busy=0, gone_at=database_time()))


def mark_gone_workers(session: Session, unseen_seconds: float) -> int:
    """Note the workers that have not been seen for so long; returns how many are new among them."""
    unseen = (Worker.gone_at.is_(None), Worker.last_seen_at < database_time(-unseen_seconds))
    mark = update(Worker).where(*unseen).values(gone_at=database_time(), busy=0).returning(Worker.id)
    return len(session.execute(mark).all())


def list_workers(session: Session, *, include_gone: bool = False) -> list[Worker]:
    """The workers, oldest first."""
    query = select(Worker).order_by(Worker.id)
    return list(session.scalars(query if include_gone else query.where(Worker.gone_at.is_(None))))


def idle_slots(session: Session, queue: str) -> int:
    """How many jobs the queue's workers could take at once."""
    return sum(max(worker.slots - worker.busy, 0) for worker in list_workers(session) if queue in worker.queues)


def served_queues(session: Session, within_seconds: float = SERVED_SECONDS) -> set[str]:
    """The queues that some worker serves, or has served a short while ago: it may be starting again."""
    recent = or_(Worker.gone_at.is_(None), Worker.last_seen_at > database_time(-within_seconds))
    return {queue for queues in session.scalars(select(Worker.queues).where(recent)) for queue in queues}


def forget_gone_workers(session: Session, keep_seconds: float) -> int:
    """Delete the rows of workers that have been gone for so long; returns how many."""
    old = delete(Worker).where(Worker.gone_at < database_time(-keep_seconds)).returning(Worker.id)
    return len(session.execute(old).all())
