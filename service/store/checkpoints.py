"""Checkpoints: the resumable states of a job, of which the two newest are kept."""

from dataclasses import dataclass

from sqlalchemy import and_, delete, func, insert, or_, select, update
from sqlalchemy.orm import Session

from service.contract.ids import CHECKPOINT, new_id
from service.contract.states import TERMINAL_STATES, JobState
from service.store.fence import hold_lease, leased
from service.store.tables import Checkpoint, Job
from service.store.time import database_time

KEPT = 2
_NEWEST_FIRST = (
    Checkpoint.epoch.desc(),
    Checkpoint.created_at.desc(),
    Checkpoint.position.desc(),
    Checkpoint.id.desc(),
)


@dataclass(frozen=True, kw_only=True)
class CheckpointRow:
    """Where a resumable state lies, and what its bytes must hash to."""

    id: str
    epoch: int
    position: int
    blob_key: str
    sha256: str
    bytes: int


def insert_checkpoint(
    session: Session,
    job_id: str,
    epoch: int,
    *,
    position: int,
    blob_key: str,
    sha256: str,
    bytes: int,  # noqa: A002
) -> list[str] | None:
    """Make a stored state count, and keep the two newest; None when the lease is lost.

    Returned are the blob keys of the rows that were dropped: delete them after the commit. `position` counts
    updates over the whole run; one further than any before it is progress and sets the count of attempts back to 0.
    """
    if not hold_lease(session, job_id, epoch):
        return None
    furthest = session.execute(select(func.max(Checkpoint.position)).where(Checkpoint.job_id == job_id)).scalar_one()
    session.execute(
        insert(Checkpoint).values(
            id=new_id(CHECKPOINT),
            job_id=job_id,
            epoch=epoch,
            position=position,
            blob_key=blob_key,
            sha256=sha256,
            bytes=bytes,
        )
    )
    if furthest is None or position > furthest:
        session.execute(update(Job).where(leased(job_id, epoch)).values(attempt=0))
    rows = list_checkpoints(session, job_id, limit=None)
    return _drop(session, rows[KEPT:])


def list_checkpoints(session: Session, job_id: str, limit: int | None = KEPT) -> list[CheckpointRow]:
    """The job's checkpoints, newest first."""
    query = select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(*_NEWEST_FIRST).limit(limit)
    return [_row(checkpoint) for checkpoint in session.scalars(query)]


def latest_checkpoint(session: Session, job_id: str) -> CheckpointRow | None:
    """The job's newest checkpoint."""
    return next(iter(list_checkpoints(session, job_id, limit=1)), None)


def drop_finished_checkpoints(session: Session, *, keep_seconds: float, limit: int = 100) -> list[str]:
    """Drop the checkpoints of jobs that have succeeded, or ended otherwise so long ago that no retry is expected.

    Returned are the blob keys that no row names any more: delete them after the commit.
    """
    over = or_(
        Job.state == JobState.SUCCEEDED,
        and_(Job.state.in_(TERMINAL_STATES), Job.finished_at < database_time(-keep_seconds)),
    )
    query = select(Checkpoint).join(Job, Job.id == Checkpoint.job_id).where(over).limit(limit)
    locked = query.with_for_update(of=Checkpoint, skip_locked=True)
    return _drop(session, [_row(checkpoint) for checkpoint in session.scalars(locked)])


def copy_checkpoints(session: Session, job_id: str, new_job_id: str) -> CheckpointRow | None:
    """Let another job resume from a job's checkpoints; returns the newest of them, None when there is none.

    The bytes are shared: they are deleted with the last row that names them. The copies have the epoch 0, older than
    any attempt of the new job. The lock keeps a sweep from dropping a row, and its bytes, before the copy is seen.
    """
    query = select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(*_NEWEST_FIRST).limit(KEPT)
    rows = list(session.scalars(query.with_for_update(read=True)))
    for row in reversed(rows):  # the ids are in order of age too
        values = {name: getattr(row, name) for name in ("position", "blob_key", "sha256", "bytes", "created_at")}
        session.execute(insert(Checkpoint).values(id=new_id(CHECKPOINT), job_id=new_job_id, epoch=0, **values))
    return _row(rows[0]) if rows else None


def _row(checkpoint: Checkpoint) -> CheckpointRow:
    return CheckpointRow(
        id=checkpoint.id,
        epoch=checkpoint.epoch,
        position=checkpoint.position,
        blob_key=checkpoint.blob_key,
        sha256=checkpoint.sha256,
        bytes=checkpoint.bytes,
    )


def _drop(session: Session, rows: list[CheckpointRow]) -> list[str]:
    if not rows:
        return []
    session.execute(delete(Checkpoint).where(Checkpoint.id.in_([row.id for row in rows])))
    keys = {row.blob_key for row in rows}
    kept = set(session.scalars(select(Checkpoint.blob_key).where(Checkpoint.blob_key.in_(keys))))
    return sorted(keys - kept)
