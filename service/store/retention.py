"""What has been kept for long enough: each rule deletes one batch, never what is in use, and may run twice at once."""

from sqlalchemy import and_, delete, or_, select, update
from sqlalchemy.orm import Session

from service.contract.states import TERMINAL_STATES
from service.store.deletion import NAMING_A_DATASET, NAMING_A_MODEL, Deleted, NamingColumns, drop_jobs
from service.store.tables import Artifact, Dataset, Job, Model
from service.store.time import database_time

JOBS_AT_ONCE = 20  # each may have thousands of rows
ROWS_AT_ONCE = 500


def drop_old_jobs(session: Session, keep_seconds: float, limit: int = JOBS_AT_ONCE) -> tuple[int, Deleted]:
    """Delete jobs that ended so long ago; returns how many, and the keys to see to after the commit."""
    old = select(Job.id).where(Job.finished_at < database_time(-keep_seconds)).order_by(Job.finished_at).limit(limit)
    ids = list(session.scalars(old.with_for_update(skip_locked=True)))
    return len(ids), Deleted(drop_jobs(session, ids) if ids else [])


def drop_old_artifacts(session: Session, keep_seconds: float, limit: int = ROWS_AT_ONCE) -> tuple[int, Deleted]:
    """Delete the files of ended jobs that were made so long ago."""
    ended = select(Job.id).where(Job.id == Artifact.job_id, Job.state.in_(TERMINAL_STATES)).exists()
    old = select(Artifact.id).where(Artifact.created_at < database_time(-keep_seconds), ended).limit(limit)
    ids = list(session.scalars(old.with_for_update(skip_locked=True)))
    keys = list(session.scalars(delete(Artifact).where(Artifact.id.in_(ids)).returning(Artifact.blob_key)))
    return len(keys), Deleted(keys)


def drop_old_models(session: Session, keep_seconds: float, limit: int = ROWS_AT_ONCE) -> tuple[int, Deleted]:
    """Delete models that were uploaded, and last named by a new job, so long ago, and that no job waits for."""
    return _drop_old_uploads(session, Model, NAMING_A_MODEL, keep_seconds, limit)


def drop_old_datasets(session: Session, keep_seconds: float, limit: int = ROWS_AT_ONCE) -> tuple[int, Deleted]:
    """Delete datasets that were uploaded, and last named by a new job, so long ago, and that no job waits for."""
    return _drop_old_uploads(session, Dataset, NAMING_A_DATASET, keep_seconds, limit)


def _drop_old_uploads(
    session: Session,
    table: type[Model | Dataset],
    columns: NamingColumns,
    keep_seconds: float,
    limit: int,
) -> tuple[int, Deleted]:
    before = database_time(-keep_seconds)
    kept_by = or_(Job.state.not_in(TERMINAL_STATES), Job.created_at >= before)
    unused = and_(*(~select(Job.id).where(and_(column == table.id, kept_by)).exists() for column in columns))
    old = select(table.id).where(table.deleted_at.is_(None), table.created_at < before, unused).limit(limit)
    ids = list(session.scalars(old.with_for_update(skip_locked=True)))
    # Asked again under the lock: a submission may have named one of them since.
    drop = update(table).where(table.id.in_(ids), unused).values(deleted_at=database_time())
    keys = list(session.scalars(drop.returning(table.blob_key)))
    return len(keys), Deleted(keys)
