"""The tables of the job store; everything else about SQL is in the files beside this one."""

from datetime import datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from service.store.time import UtcDateTime, database_time

JsonObject = dict[str, Any]


class Base(DeclarativeBase):
    """Base of every table; constraints are named so that migrations can speak of them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_N_label)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads it from the class
        datetime: UtcDateTime,
        JsonObject: JSON(none_as_null=True),
        list[int]: JSON(none_as_null=True),
        list[str]: JSON(none_as_null=True),
        str: Text,
        int: BigInteger,
        float: Float,
        bool: Boolean,
    }


def _id() -> Mapped[str]:
    return mapped_column(String(40), primary_key=True)


def _created() -> Mapped[datetime]:
    return mapped_column(default=database_time())


class Model(Base):
    """An uploaded TorchScript file."""

    __tablename__ = "models"
    __table_args__ = (UniqueConstraint("owner", "sha256"),)

    id: Mapped[str] = _id()
    owner: Mapped[str]
    name: Mapped[str | None]
    sha256: Mapped[str] = mapped_column(String(64))
    bytes: Mapped[int]
    blob_key: Mapped[str] = mapped_column(index=True)
    created_at: Mapped[datetime] = _created()
    deleted_at: Mapped[datetime | None]  # the row stays while a job names it; its bytes do not


class Dataset(Base):
    """An uploaded set of inputs, with or without targets."""

    __tablename__ = "datasets"
    __table_args__ = (UniqueConstraint("owner", "sha256"),)

    id: Mapped[str] = _id()
    owner: Mapped[str]
    name: Mapped[str | None]
    format: Mapped[str] = mapped_column(String(20))
    sha256: Mapped[str] = mapped_column(String(64))
    bytes: Mapped[int]
    blob_key: Mapped[str] = mapped_column(index=True)
    created_at: Mapped[datetime] = _created()
    deleted_at: Mapped[datetime | None]  # as for models


class Job(Base):
    """A job: the row is the job, and its own outbox."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint("state IN ('queued', 'running', 'succeeded', 'failed', 'canceled')", name="state"),
        CheckConstraint("(state = 'running') = (lease_expires_at IS NOT NULL)", name="lease_iff_running"),
        CheckConstraint("(state IN ('succeeded', 'failed', 'canceled')) = (finished_at IS NOT NULL)", name="finished"),
        CheckConstraint("attempt >= 0 AND attempt <= max_attempts", name="attempts"),
        CheckConstraint("(state = 'failed') = (problem IS NOT NULL)", name="problem_iff_failed"),
        Index(
            "ix_jobs_claimable",
            "queue",
            "priority",
            "created_at",
            "id",
            sqlite_where=text("state = 'queued'"),
            postgresql_where=text("state = 'queued'"),
        ),
        Index(
            "ix_jobs_leased",
            "lease_expires_at",
            sqlite_where=text("state = 'running'"),
            postgresql_where=text("state = 'running'"),
        ),
        Index("ix_jobs_owner_id", "owner", "id"),
        Index(
            "ix_jobs_finished_at",
            "finished_at",
            sqlite_where=text("finished_at IS NOT NULL"),
            postgresql_where=text("finished_at IS NOT NULL"),
        ),
    )

    id: Mapped[str] = _id()
    owner: Mapped[str]
    name: Mapped[str | None]
    queue: Mapped[str]
    device: Mapped[str] = mapped_column(
        String(10), default="auto", server_default="auto"
    )  # as asked for; only "auto" may change its queue
    priority: Mapped[int] = mapped_column(Integer, default=0)  # lower runs first
    min_gpu_memory_bytes: Mapped[int | None]
    retry_of: Mapped[str | None] = mapped_column(String(40))
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), index=True)
    dataset_id: Mapped[str | None] = mapped_column(ForeignKey("datasets.id"), index=True)
    objective_model_id: Mapped[str | None] = mapped_column(ForeignKey("models.id"), index=True)  # its loss
    requested_spec: Mapped[JsonObject]
    spec: Mapped[JsonObject]
    spec_sha256: Mapped[str] = mapped_column(String(64))

    state: Mapped[str] = mapped_column(String(20), default="queued")
    phase: Mapped[str | None] = mapped_column(String(40))
    progress: Mapped[JsonObject] = mapped_column(default=dict)
    not_before: Mapped[datetime] = mapped_column(default=database_time())
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    max_attempts: Mapped[int] = mapped_column(Integer)
    lease_epoch: Mapped[int] = mapped_column(Integer, default=0)
    lease_owner: Mapped[str | None]
    lease_expires_at: Mapped[datetime | None]
    cancel_requested_at: Mapped[datetime | None]
    run_seconds_used: Mapped[float] = mapped_column(default=0.0)  # of the attempts that have ended
    run_seconds_limit: Mapped[float]
    queue_expires_at: Mapped[datetime | None]  # a job that has not begun by then fails
    last_event: Mapped[int] = mapped_column(default=0)
    result: Mapped[JsonObject | None]
    problem: Mapped[JsonObject | None]

    created_at: Mapped[datetime] = _created()
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class Attempt(Base):
    """One try of a job by one worker."""

    __tablename__ = "attempts"
    __table_args__ = (
        UniqueConstraint("job_id", "epoch"),
        CheckConstraint("(outcome IS NULL) = (ended_at IS NULL)", name="ended_iff_outcome"),
        CheckConstraint(
            "outcome IS NULL OR outcome IN "
            "('succeeded', 'failed', 'canceled', 'crashed', 'deferred', 'drained', 'lost')",
            name="outcome",
        ),
        Index(
            "ix_attempts_open",
            "job_id",
            sqlite_where=text("ended_at IS NULL"),
            postgresql_where=text("ended_at IS NULL"),
        ),
    )

    id: Mapped[str] = _id()
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    epoch: Mapped[int] = mapped_column(Integer)
    worker_id: Mapped[str]
    host: Mapped[str]
    pid: Mapped[int]
    gpu: Mapped[str | None]
    started_at: Mapped[datetime] = _created()
    ended_at: Mapped[datetime | None]
    outcome: Mapped[str | None] = mapped_column(String(20))
    detail: Mapped[str | None]  # exit code, signal, or what else is known of the end


class Event(Base):
    """One numbered line of a job's history."""

    __tablename__ = "events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    epoch: Mapped[int | None] = mapped_column(Integer)
    kind: Mapped[str] = mapped_column(String(20))
    data: Mapped[JsonObject]
    created_at: Mapped[datetime] = _created()


class Layer(Base):
    """A layer of the reference model, as the census found it."""

    __tablename__ = "layers"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    position: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    epoch: Mapped[int] = mapped_column(Integer)
    name: Mapped[str]
    kind: Mapped[str]
    weight: Mapped[str | None]
    weight_shape: Mapped[list[int]]
    input_shape: Mapped[list[int] | None]
    output_shape: Mapped[list[int] | None]
    calls: Mapped[int]
    params: Mapped[int]
    macs: Mapped[int | None]


class RankConfiguration(Base):
    """Which form and size stood for one term of one layer at one step, and whether it was chosen."""

    __tablename__ = "rank_configurations"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    step: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    layer: Mapped[str] = mapped_column(primary_key=True)
    term: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    epoch: Mapped[int] = mapped_column(Integer)
    type: Mapped[str] = mapped_column(String(40), default="low_rank", server_default="low_rank")
    form: Mapped[str] = mapped_column(String(40))
    rank: Mapped[int | None]
    params: Mapped[int]
    macs: Mapped[int]
    bits: Mapped[int] = mapped_column(default=0, server_default="0")
    details: Mapped[JsonObject] = mapped_column(default=dict, server_default="{}")
    relative_error: Mapped[float]
    reason: Mapped[str | None] = mapped_column(String(40))
    chosen: Mapped[bool] = mapped_column(default=False)


class Checkpoint(Base):
    """A resumable state of an attempt; the bytes count only through this row."""

    __tablename__ = "checkpoints"
    __table_args__ = (Index("ix_checkpoints_job_id_epoch_position", "job_id", "epoch", "position"),)

    id: Mapped[str] = _id()
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    epoch: Mapped[int] = mapped_column(Integer)
    position: Mapped[int]  # its place in the run, in optimizer updates
    blob_key: Mapped[str] = mapped_column(index=True)
    sha256: Mapped[str] = mapped_column(String(64))
    bytes: Mapped[int]
    created_at: Mapped[datetime] = _created()


class Artifact(Base):
    """A file that a job produced."""

    __tablename__ = "artifacts"
    __table_args__ = (UniqueConstraint("job_id", "name"),)

    id: Mapped[str] = _id()
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    epoch: Mapped[int] = mapped_column(Integer)
    name: Mapped[str]
    format: Mapped[str] = mapped_column(String(20))
    blob_key: Mapped[str] = mapped_column(index=True)
    sha256: Mapped[str] = mapped_column(String(64))
    bytes: Mapped[int]
    created_at: Mapped[datetime] = _created()


class Worker(Base):
    """A process that can run jobs."""

    __tablename__ = "workers"

    id: Mapped[str] = _id()
    host: Mapped[str]
    pid: Mapped[int]
    queues: Mapped[list[str]]
    version: Mapped[str] = mapped_column(String(40), default="")
    slots: Mapped[int] = mapped_column(Integer)
    busy: Mapped[int] = mapped_column(Integer, default=0)
    devices: Mapped[JsonObject] = mapped_column(default=dict)
    started_at: Mapped[datetime] = _created()
    last_seen_at: Mapped[datetime] = _created()
    gone_at: Mapped[datetime | None]


class Counter(Base):
    """How often something has happened, over all processes; it only grows."""

    __tablename__ = "counters"

    name: Mapped[str] = mapped_column(String(40), primary_key=True)
    label: Mapped[str] = mapped_column(String(40), primary_key=True)
    value: Mapped[float] = mapped_column(default=0.0)


class ApiKey(Base):
    """Whose requests a key speaks for; the key itself is never stored."""

    __tablename__ = "api_keys"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str]
    name: Mapped[str | None]
    created_at: Mapped[datetime] = _created()
    revoked_at: Mapped[datetime | None]


class IdempotencyKey(Base):
    """A client's key for one request; the job stands here once the request was accepted."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (
        UniqueConstraint("owner", "key"),
        CheckConstraint("(job_id IS NULL) = (fingerprint IS NULL)", name="complete"),
    )

    id: Mapped[str] = _id()  # the reservation: only its holder completes or abandons it
    owner: Mapped[str]
    key: Mapped[str] = mapped_column(String(255))
    fingerprint: Mapped[str | None] = mapped_column(String(64))
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[datetime] = _created()
