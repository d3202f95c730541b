"""Idempotency keys: a request that is sent twice is accepted once.

A key is reserved before the body is read, when its fingerprint is not yet known; the reservation is completed in the
transaction that inserts the job, or abandoned. A replay carries the first fingerprint for the caller to compare.
"""

from dataclasses import dataclass

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from service.contract.ids import REQUEST, new_id
from service.store.tables import IdempotencyKey
from service.store.time import database_time
from service.store.upserts import insert_if_absent


@dataclass(frozen=True)
class Fresh:
    """The key is reserved for this request: `complete` or `abandon` it."""

    reservation: str


@dataclass(frozen=True)
class InFlight:
    """The first request with this key has not been answered yet."""


@dataclass(frozen=True)
class Replay:
    """The first request was accepted as this job; another body has another fingerprint."""

    fingerprint: str
    job_id: str


def begin(session: Session, owner: str, key: str, *, in_flight_seconds: float) -> Fresh | InFlight | Replay:
    """Reserve the key, or say what became of the first request; a reservation older than the limit is taken over."""
    reservation = new_id(REQUEST)
    if insert_if_absent(session, IdempotencyKey, {"id": reservation, "owner": owner, "key": key}):
        return Fresh(reservation)
    where = (IdempotencyKey.owner == owner, IdempotencyKey.key == key)
    stale = (IdempotencyKey.job_id.is_(None), IdempotencyKey.created_at < database_time(-in_flight_seconds))
    take = update(IdempotencyKey).where(*where, *stale).values(id=reservation, created_at=database_time())
    if session.execute(take.returning(IdempotencyKey.id)).first() is not None:
        return Fresh(reservation)
    row = session.execute(select(IdempotencyKey.fingerprint, IdempotencyKey.job_id).where(*where)).one_or_none()
    if row is None or row.job_id is None:  # none: the first was abandoned this very moment; the client may retry
        return InFlight()
    return Replay(fingerprint=row.fingerprint, job_id=row.job_id)


def complete(session: Session, reservation: str, fingerprint: str, job_id: str) -> bool:
    """Tie the key to the job, in the transaction that inserts it.

    False means that the reservation was taken over: roll back, for another request stands for the key now.
    """
    tie = update(IdempotencyKey).where(IdempotencyKey.id == reservation, IdempotencyKey.job_id.is_(None))
    return (
        session.execute(tie.values(fingerprint=fingerprint, job_id=job_id).returning(IdempotencyKey.id)).first()
        is not None
    )


def abandon(session: Session, reservation: str) -> None:
    """Free the key of a request that was refused; one that was completed stays."""
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.id == reservation, IdempotencyKey.job_id.is_(None)))


def abandon_all(session: Session) -> int:
    """Free every key whose request was never answered; for a start that knows no other process serves this store."""
    return len(
        session.execute(
            delete(IdempotencyKey).where(IdempotencyKey.job_id.is_(None)).returning(IdempotencyKey.id)
        ).all()
    )


def forget_old_keys(session: Session, keep_seconds: float) -> int:
    """Drop keys older than this; returns how many."""
    drop = delete(IdempotencyKey).where(IdempotencyKey.created_at < database_time(-keep_seconds))
    return len(session.execute(drop.returning(IdempotencyKey.id)).all())
