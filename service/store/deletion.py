"""Deleting what owners no longer want; what a waiting or running job needs stays."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import delete, or_, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from service.contract.states import TERMINAL_STATES
from service.store.tables import (
    Artifact,
    Attempt,
    Checkpoint,
    Dataset,
    Event,
    IdempotencyKey,
    Job,
    Layer,
    Model,
    RankConfiguration,
)
from service.store.time import database_time

NamingColumns = Sequence[InstrumentedAttribute[str] | InstrumentedAttribute[str | None]]
NAMING_A_MODEL: NamingColumns = (Job.model_id, Job.objective_model_id)
NAMING_A_DATASET: NamingColumns = (Job.dataset_id,)
_OF_A_JOB = (Event, Attempt, Layer, RankConfiguration, IdempotencyKey)


@dataclass(frozen=True)
class Deleted:
    """The rows are gone with the transaction; these keys may have no row left: see to them after the commit."""

    keys: list[str]


@dataclass(frozen=True)
class InUse:
    """Nothing was deleted: this job has not ended."""

    job_id: str
    state: str


def delete_job(session: Session, job_id: str, owner: str) -> Deleted | InUse | None:
    """Delete an ended job with its history, checkpoints and artifacts; None when the owner has no such job."""
    query = select(Job.state).where(Job.id == job_id, Job.owner == owner).with_for_update()
    state = session.execute(query).scalar_one_or_none()
    if state is None:
        return None
    if state not in TERMINAL_STATES:
        return InUse(job_id, state)
    return Deleted(drop_jobs(session, [job_id]))


def delete_model(session: Session, model_id: str, owner: str) -> Deleted | InUse | None:
    """Delete a model that no waiting or running job names; None when the owner has no such model."""
    return _delete_upload(session, Model, NAMING_A_MODEL, model_id, owner)


def delete_dataset(session: Session, dataset_id: str, owner: str) -> Deleted | InUse | None:
    """Delete a dataset that no waiting or running job names; None when the owner has no such dataset."""
    return _delete_upload(session, Dataset, NAMING_A_DATASET, dataset_id, owner)


def delete_artifact(session: Session, artifact_id: str, owner: str) -> Deleted | InUse | None:
    """Delete one file of an ended job; None when the owner has no such artifact."""
    of_owner = Job.id == Artifact.job_id, Job.owner == owner, Artifact.id == artifact_id
    job = session.execute(select(Job.id, Job.state).where(*of_owner)).one_or_none()
    if job is None:
        return None
    if job.state not in TERMINAL_STATES:
        return InUse(job.id, job.state)
    drop = delete(Artifact).where(Artifact.id == artifact_id).returning(Artifact.blob_key)
    keys = list(session.scalars(drop))
    return Deleted(keys) if keys else None


def drop_jobs(session: Session, job_ids: Collection[str]) -> list[str]:
    """Delete ended jobs, locked by the caller, with all that hangs on them; returns the keys of their blobs."""
    keys: set[str] = set()
    for table in (Checkpoint, Artifact):
        keys.update(session.scalars(delete(table).where(table.job_id.in_(job_ids)).returning(table.blob_key)))
    for table_of_job in _OF_A_JOB:
        session.execute(delete(table_of_job).where(table_of_job.job_id.in_(job_ids)))
    session.execute(delete(Job).where(Job.id.in_(job_ids)))
    return sorted(keys)


def drop_unnamed(session: Session) -> int:
    """Delete the rows of deleted models and datasets that no job names any more; returns how many."""
    dropped = 0
    for table, columns in ((Model, NAMING_A_MODEL), (Dataset, NAMING_A_DATASET)):
        named = [select(Job.id).where(column == table.id).exists() for column in columns]
        unnamed = [~each for each in named]
        drop = delete(table).where(table.deleted_at.is_not(None), *unnamed).returning(table.id)
        dropped += len(session.execute(drop).all())
    return dropped


def _delete_upload(
    session: Session,
    table: type[Model | Dataset],
    columns: NamingColumns,
    row_id: str,
    owner: str,
) -> Deleted | InUse | None:
    row = (table.id == row_id, table.owner == owner, table.deleted_at.is_(None))
    key = session.execute(select(table.blob_key).where(*row).with_for_update()).scalar_one_or_none()
    if key is None:
        return None
    # A statement of its own, after the lock: it sees the job of a submission that held the row until now.
    names_it = or_(*(column == row_id for column in columns))
    waiting = select(Job.id, Job.state).where(names_it, Job.state.not_in(TERMINAL_STATES)).limit(1)
    job = session.execute(waiting).one_or_none()
    if job is not None:
        return InUse(job.id, job.state)
    session.execute(update(table).where(table.id == row_id).values(deleted_at=database_time()))
    return Deleted([key])
