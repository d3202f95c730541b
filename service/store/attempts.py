"""What a worker does to a job, each step fenced by (job, epoch, running)."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, ScalarSelect, and_, func, insert, or_, select, update
from sqlalchemy.orm import Session

from service.contract.errors import ErrorCode, Problem, ProblemError
from service.contract.events import EventKind, Progress
from service.contract.ids import ATTEMPT, new_id
from service.contract.resources import AttemptResource, ResultSummary
from service.contract.states import AttemptOutcome, JobState, Phase
from service.store.checkpoints import CheckpointRow, list_checkpoints
from service.store.events import append_events
from service.store.fence import hold_lease, leased
from service.store.tables import Attempt, Dataset, Job, Model
from service.store.time import database_time
from service.store.transitions import end_running, return_to_queue

BACKOFF_GROWTH = 4.0


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """A model or dataset that a claimed job reads."""

    id: str
    blob_key: str
    sha256: str
    bytes: int
    format: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A job that now belongs to one attempt."""

    job_id: str
    queue: str
    epoch: int
    attempt: int  # tries since the last checkpoint, this one counted
    max_attempts: int
    spec: dict[str, Any]
    requested_spec: dict[str, Any]
    spec_sha256: str
    device: str  # as asked for
    min_gpu_memory_bytes: int | None
    model: InputFile
    dataset: InputFile | None
    objective: InputFile | None  # the module of its loss
    checkpoints: list[CheckpointRow]  # newest first, two at most
    run_seconds_used: float  # by earlier attempts
    run_seconds_limit: float
    fraction: float  # how far an earlier attempt was seen to be
    told: frozenset[str] = frozenset()  # what the history already says of steps, metrics and warnings


@dataclass(frozen=True)
class Beat:
    """The answer to a heartbeat that was confirmed."""

    cancel_requested: bool


def backoff_seconds(attempt: int, base_seconds: float, cap_seconds: float) -> float:
    """How long a job waits after its n-th try without progress: base · 4^(n−1), at most the cap."""
    return float(min(cap_seconds, base_seconds * BACKOFF_GROWTH ** max(attempt - 1, 0)))


def claim(
    session: Session,
    *,
    queue: str,
    worker_id: str,
    host: str,
    pid: int,
    lease_seconds: float,
    gpu: str | None = None,
    gpu_memory_bytes: int | None = None,
) -> Claim | None:
    """Take the best waiting job of the queue (priority, then age) and open its attempt; None when none waits.

    A job that asks for GPU memory is passed over where the GPU has less, or where there is none.
    """
    take = (
        update(Job)
        .where(Job.id == _best(queue, gpu_memory_bytes or 0), Job.state == JobState.QUEUED)
        .values(
            state=JobState.RUNNING,
            phase=Phase.STARTING,
            attempt=Job.attempt + 1,
            lease_epoch=Job.lease_epoch + 1,
            lease_owner=worker_id,
            lease_expires_at=database_time(lease_seconds),
            started_at=func.coalesce(Job.started_at, database_time()),
        )
        .returning(Job)
    )
    row = session.scalars(take).one_or_none()
    if row is None:
        return None
    session.execute(
        insert(Attempt).values(
            id=new_id(ATTEMPT), job_id=row.id, epoch=row.lease_epoch, worker_id=worker_id, host=host, pid=pid, gpu=gpu
        )
    )
    data = {"state": JobState.RUNNING, "epoch": row.lease_epoch, "host": host}
    append_events(session, row.id, row.lease_epoch, [(EventKind.STATE, data)])
    return _claim_of(session, row)


def count_claimable(session: Session, queue: str, gpu_memory_bytes: int | None = None) -> int:
    """How many jobs of the queue could be claimed now; by a GPU with this memory, or by any."""
    return session.execute(
        select(func.count()).select_from(Job).where(_claimable(queue, gpu_memory_bytes))
    ).scalar_one()


def list_attempts(session: Session, job_id: str) -> list[AttemptResource]:
    """The job's attempts, oldest first."""
    query = select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.epoch)
    return [
        AttemptResource(
            epoch=row.epoch,
            worker_id=row.worker_id,
            host=row.host,
            gpu=row.gpu,
            started_at=row.started_at,
            ended_at=row.ended_at,
            outcome=None if row.outcome is None else AttemptOutcome(row.outcome),
            detail=row.detail,
        )
        for row in session.scalars(query)
    ]


def heartbeat(
    session: Session,
    job_id: str,
    epoch: int,
    *,
    lease_seconds: float,
    phase: str | None = None,
    progress: Progress | None = None,
) -> Beat | None:
    """Prolong the lease and show how far the job is; None when the lease is lost: kill the child, write nothing."""
    values: dict[str, Any] = {"lease_expires_at": database_time(lease_seconds)}
    if phase is not None:
        values["phase"] = phase
    if progress is not None:
        values["progress"] = progress.model_dump(mode="json")
    beat = update(Job).where(leased(job_id, epoch)).values(values).returning(Job.cancel_requested_at)
    row = session.execute(beat).one_or_none()
    return None if row is None else Beat(cancel_requested=row.cancel_requested_at is not None)


def set_resolved_spec(session: Session, job_id: str, epoch: int, spec: dict[str, Any]) -> bool:
    """Store the spec with what the run has resolved; False when the lease is lost."""
    change = update(Job).where(leased(job_id, epoch)).values(spec=spec).returning(Job.id)
    return session.execute(change).first() is not None


def finish_succeeded(session: Session, job_id: str, epoch: int, result: ResultSummary) -> bool:
    """`running → succeeded`; False when the lease is lost."""
    return end_running(
        session,
        job_id,
        epoch,
        JobState.SUCCEEDED,
        outcome=AttemptOutcome.SUCCEEDED,
        result=result.model_dump(mode="json"),
    )


def finish_failed(
    session: Session,
    job_id: str,
    epoch: int,
    problem: Problem,
    outcome: AttemptOutcome = AttemptOutcome.FAILED,
    *,
    detail: str | None = None,
) -> bool:
    """`running → failed`, for what no retry can mend; False when the lease is lost."""
    return end_running(
        session, job_id, epoch, JobState.FAILED, outcome=outcome, problem=problem, detail=detail or problem.detail
    )


def finish_canceled(session: Session, job_id: str, epoch: int) -> bool:
    """`running → canceled`; False when the lease is lost."""
    return end_running(session, job_id, epoch, JobState.CANCELED, outcome=AttemptOutcome.CANCELED)


def requeue(
    session: Session,
    job_id: str,
    epoch: int,
    *,
    outcome: AttemptOutcome,
    delay_seconds: float,
    counted: bool,
    detail: str | None = None,
    problem: Problem | None = None,
) -> JobState | None:
    """Give the job back: `queued`, or `canceled` if flagged, or `failed` if its attempts are used up.

    The state it came to is returned, None when the lease is lost. `problem` is what a failure says; without one it
    is `WORKER_LOST` with the detail. An attempt that is not counted (a drain) never uses up the job.
    """
    if not hold_lease(session, job_id, epoch):
        return None
    row = session.execute(select(Job.attempt, Job.max_attempts, Job.cancel_requested_at).where(Job.id == job_id)).one()
    if row.cancel_requested_at is not None:
        end_running(session, job_id, epoch, JobState.CANCELED, outcome=outcome, detail=detail)
        return JobState.CANCELED
    if counted and row.attempt >= row.max_attempts:
        final = problem or _worker_lost(row.attempt, detail)
        end_running(session, job_id, epoch, JobState.FAILED, outcome=outcome, detail=detail, problem=final)
        return JobState.FAILED
    return_to_queue(
        session, job_id, epoch, outcome=outcome, delay_seconds=delay_seconds, counted=counted, detail=detail
    )
    return JobState.QUEUED


def _best(queue: str, gpu_memory_bytes: int) -> ScalarSelect[str]:
    """The id of the first job that can be claimed, passing over those that another transaction is claiming."""
    return (
        select(Job.id)
        .where(_claimable(queue, gpu_memory_bytes))
        .order_by(Job.priority, Job.created_at, Job.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )


def _claimable(queue: str, gpu_memory_bytes: int | None) -> ColumnElement[bool]:
    conditions = [
        Job.queue == queue,
        Job.state == JobState.QUEUED,
        Job.not_before <= database_time(),
        Job.cancel_requested_at.is_(None),
        Job.attempt < Job.max_attempts,
        # What a deadline has ended is left to the reconciler, which says so.
        or_(Job.queue_expires_at.is_(None), Job.lease_epoch > 0, Job.queue_expires_at > database_time()),
        Job.run_seconds_used < Job.run_seconds_limit,
    ]
    if gpu_memory_bytes is not None:
        conditions.append(or_(Job.min_gpu_memory_bytes.is_(None), Job.min_gpu_memory_bytes <= gpu_memory_bytes))
    return and_(*conditions)


def _claim_of(session: Session, row: Job) -> Claim:
    model = session.get_one(Model, row.model_id)
    objective = None if row.objective_model_id is None else session.get_one(Model, row.objective_model_id)
    dataset = None if row.dataset_id is None else session.get_one(Dataset, row.dataset_id)
    return Claim(
        job_id=row.id,
        queue=row.queue,
        epoch=row.lease_epoch,
        attempt=row.attempt,
        max_attempts=row.max_attempts,
        spec=row.spec,
        requested_spec=row.requested_spec,
        spec_sha256=row.spec_sha256,
        device=row.device,
        min_gpu_memory_bytes=row.min_gpu_memory_bytes,
        model=_input_file(model, "torchscript"),
        dataset=None if dataset is None else _input_file(dataset, dataset.format),
        objective=None if objective is None else _input_file(objective, "torchscript"),
        checkpoints=list_checkpoints(session, row.id),
        run_seconds_used=row.run_seconds_used,
        run_seconds_limit=row.run_seconds_limit,
        fraction=Progress.model_validate(row.progress).fraction,
    )


def _input_file(row: Model | Dataset, file_format: str) -> InputFile:
    return InputFile(id=row.id, blob_key=row.blob_key, sha256=row.sha256, bytes=row.bytes, format=file_format)


def _worker_lost(attempts: int, detail: str | None) -> Problem:
    told = f"; the last one ended with: {detail}" if detail else ""
    return ProblemError(
        ErrorCode.WORKER_LOST,
        f"expected the job to reach its next checkpoint within {attempts} attempts; each of them died before{told}. "
        "Look for what ends the process (memory, a crash in the model), then submit the job again",
    ).problem()
