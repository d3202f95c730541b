"""Submitting a job: what must hold before it is accepted, and the transaction that is the acceptance."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from service.blobs.store import BlobStore
from service.blobs.tensors import likely_inputs
from service.contract import ids
from service.contract.errors import ErrorCode, FieldError, ProblemError
from service.contract.marks import mark
from service.contract.resolve import resolve_at_submit
from service.contract.resources import JobResource
from service.contract.spec import JobSpec, parse_spec
from service.jobs import idempotency
from service.jobs.files import ReceivedFile, existing_dataset, existing_model, store_dataset, store_model
from service.jobs.read import existing_job, read_job
from service.services import Services
from service.settings import Settings
from service.store import jobs
from service.store.idempotency import Fresh, Replay
from service.store.workers import served_queues

_EXAMPLE = [{"shape": [1, 3, 224, 224], "dtype": "float32"}]


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What a request asks for: each file as received with it, or as the id of an earlier upload."""

    owner: str
    name: str | None
    requested_spec: dict[str, Any]
    model: ReceivedFile | str
    dataset: ReceivedFile | str | None


@dataclass(frozen=True)
class Accepted:
    """The job that answers a submission; `replayed` when an earlier request had started it."""

    job: JobResource
    replayed: bool


def checked_spec(services: Services, submission: Submission) -> JobSpec:
    """Read the spec and check what can be checked before the model is loaded."""
    spec = parse_spec(submission.requested_spec)
    if submission.dataset is None and spec.example_inputs is None:
        path = _model_file(services, submission)
        example = json.dumps((likely_inputs(path) if path is not None else None) or _EXAMPLE)
        message = (
            "without data the model's inputs are unknown; send data, or say what the model takes, the batch first: "
            f'for this model try "example_inputs": {example}'
        )
        error = FieldError(pointer="/example_inputs", code="missing", message=message)
        raise ProblemError(ErrorCode.EXAMPLE_INPUTS_MISSING, f"/example_inputs: {message}", errors=[error])
    return spec


def _model_file(services: Services, submission: Submission) -> Path | None:
    """The model's file where it lies on this machine."""
    if isinstance(submission.model, ReceivedFile):
        return submission.model.staged.path
    with services.database.read() as session:
        return services.blobs.local_path(existing_model(session, submission.owner, submission.model).blob_key)


def check_submission(services: Services, submission: Submission) -> dict[str, Any]:
    """Check everything that acceptance checks, and return the resolved spec; nothing is written."""
    spec = checked_spec(services, submission)
    with services.database.read() as session:
        _check_references(session, submission)
    return resolve_at_submit(spec)


def submit(services: Services, submission: Submission, key: Fresh | Replay | None) -> Accepted:
    """Accept a job, or find the one that this idempotency key has started.

    When this returns, the job and its first event are durable; the bell is rung after that and may fail. A raised
    error means that nothing was accepted, but for a database that went away: then the key tells, once it is back.
    """
    fingerprint = _fingerprint(submission)
    if isinstance(key, Replay):
        idempotency.check_same(key, fingerprint)
        return Accepted(read_job(services, submission.owner, key.job_id), replayed=True)
    spec = checked_spec(services, submission)
    model_of, dataset_of = _store_files(services, submission)

    def insert(session: Session, job_id: str) -> str:
        model_id, dataset_id = model_of(session), dataset_of(session)
        queue = queue_for(session, spec)
        jobs.insert_job(session, new_job(services.settings, submission, spec, job_id, model_id, dataset_id, queue))
        return queue

    return accept(services, submission.owner, insert, key, fingerprint)


def accept(
    services: Services, owner: str, insert: Callable[[Session, str], str], key: Fresh | None, fingerprint: str
) -> Accepted:
    """Accept a job in one transaction, where `insert` writes it under a new id and returns its queue; then ring."""
    job_id = ids.new_id(ids.JOB)
    with services.database.write() as session:
        queue = insert(session, job_id)
        if key is not None:
            idempotency.tie(session, key, fingerprint, job_id)
        row = existing_job(session, owner, job_id)
        accepted = Accepted(jobs.job_resource(row, jobs.queue_position(session, row)), replayed=False)
    mark("after_commit")
    services.bell.ring_soon(queue)
    return accepted


def _store_files(
    services: Services, submission: Submission
) -> tuple[Callable[[Session], str], Callable[[Session], str | None]]:
    """Move received files into the store before the transaction, which is then short; return what finds their ids."""
    owner, model, dataset = submission.owner, submission.model, submission.dataset
    with services.database.read() as session:
        _check_references(session, submission)
    return _model_id(services.blobs, owner, model), _dataset_id(services.blobs, owner, dataset)


def _model_id(blobs: BlobStore, owner: str, model: ReceivedFile | str) -> Callable[[Session], str]:
    if isinstance(model, str):
        return lambda session: existing_model(session, owner, model, lock=True).id
    write = store_model(blobs, model)
    return lambda session: write(session, owner).id


def _dataset_id(blobs: BlobStore, owner: str, dataset: ReceivedFile | str | None) -> Callable[[Session], str | None]:
    if dataset is None:
        return lambda _: None
    if isinstance(dataset, str):
        return lambda session: existing_dataset(session, owner, dataset, lock=True).id
    write = store_dataset(blobs, dataset)
    return lambda session: write(session, owner).id


def new_job(
    settings: Settings,
    submission: Submission,
    spec: JobSpec,
    job_id: str,
    model_id: str,
    dataset_id: str | None,
    queue: str,
) -> jobs.NewJob:
    """The job that a submission asks for, under the limits that the service has now."""
    resolved = resolve_at_submit(spec)
    return jobs.NewJob(
        id=job_id,
        owner=submission.owner,
        name=submission.name,
        model_id=model_id,
        dataset_id=dataset_id,
        requested_spec=submission.requested_spec,
        spec=resolved,
        spec_sha256=hashlib.sha256(canonical(resolved)).hexdigest(),
        queue=queue,
        device=spec.device,
        priority=spec.priority,
        min_gpu_memory_bytes=spec.resources.min_gpu_memory_bytes,
        queue_seconds=spec.deadlines.queue_seconds,
        max_attempts=spec.max_attempts or settings.max_attempts,
        run_seconds_limit=min(spec.deadlines.run_seconds or settings.run_seconds_max, settings.run_seconds_max),
    )


def queue_for(session: Session, spec: JobSpec) -> str:
    """The queue of a job: its device's; where any will do, the GPUs' if a worker serves them."""
    if spec.device == "cpu":
        return "cpu"
    asks_for_gpu = spec.device == "cuda" or spec.resources.min_gpu_memory_bytes is not None
    return "gpu" if asks_for_gpu or "gpu" in served_queues(session) else "cpu"


def _check_references(session: Session, submission: Submission) -> None:
    model, dataset = submission.model, submission.dataset
    if isinstance(model, str):
        existing_model(session, submission.owner, model)
    if isinstance(dataset, str):
        existing_dataset(session, submission.owner, dataset)


def _fingerprint(submission: Submission) -> str:
    """One digest of all that a request asks for; file names are not part of it."""

    def said(file: ReceivedFile | str | None) -> str | None:
        return f"sha256:{file.sha256}" if isinstance(file, ReceivedFile) else file

    asked = [said(submission.model), said(submission.dataset), submission.requested_spec, submission.name]
    return hashlib.sha256(canonical(asked)).hexdigest()


def canonical(value: object) -> bytes:
    """The one way to write a JSON value down."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
