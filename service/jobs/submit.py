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
from service.contract.objective_spec import OBJECTIVE_PART, with_module
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
    objective: ReceivedFile | str | None = None  # the module of the loss; an id is the spec's own


@dataclass(frozen=True)
class FilesOfJob:
    """Ids of what a job reads."""

    model_id: str
    dataset_id: str | None
    objective_model_id: str | None


@dataclass(frozen=True)
class Accepted:
    """The job that answers a submission; `replayed` when an earlier request had started it."""

    job: JobResource
    replayed: bool


def checked_spec(services: Services, submission: Submission) -> JobSpec:
    """Read the spec and check what can be checked before the model is loaded."""
    spec = parse_spec(submission.requested_spec)
    _check_objective(submission, spec)
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


def _check_objective(submission: Submission, spec: JobSpec) -> None:
    """Refuse a loss module that the request does not have, or that its spec does not name."""
    named, found = spec.objective.module, submission.objective
    if named is None and found is None:
        return
    if named != OBJECTIVE_PART and isinstance(found, ReceivedFile):
        message = (
            f"the request has a part '{OBJECTIVE_PART}', which the spec does not name; expected "
            f'{{"objective": {{"loss": {{"module": "{OBJECTIVE_PART}"}}}}}}'
        )
    elif named == OBJECTIVE_PART and found is None:
        message = (
            f"'{OBJECTIVE_PART}' names a part of a multipart request, and there is none; send the TorchScript module "
            "as that part, or upload it with POST /v1/models and name its id"
        )
    elif submission.dataset is None:
        message = "a loss module needs data to be computed on, and the job has none; send data"
    else:
        return
    error = FieldError(pointer="/objective/loss/module", code="objective", message=message)
    raise ProblemError(ErrorCode.SPEC_INVALID, f"/objective/loss/module: {message}", errors=[error])


def named_objective(requested_spec: Any) -> str | None:
    """The id of the uploaded module that a spec names as its loss, if it does; the spec is checked elsewhere."""
    objective = requested_spec.get("objective") if isinstance(requested_spec, dict) else None
    loss = objective.get("loss") if isinstance(objective, dict) else None
    module = loss.get("module") if isinstance(loss, dict) else None
    return module if isinstance(module, str) and module != OBJECTIVE_PART else None


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
    files_of = _store_files(services, submission)

    def insert(session: Session, job_id: str) -> str:
        files = files_of(session)
        queue = queue_for(session, spec)
        jobs.insert_job(session, new_job(services.settings, submission, spec, job_id, files, queue))
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


def _store_files(services: Services, submission: Submission) -> Callable[[Session], FilesOfJob]:
    """Move received files into the store before the transaction, which is then short; return what finds their ids."""
    owner, objective = submission.owner, submission.objective
    with services.database.read() as session:
        _check_references(session, submission)
    model_of = _model_id(services.blobs, owner, submission.model)
    dataset_of = _dataset_id(services.blobs, owner, submission.dataset)
    objective_of = None if objective is None else _model_id(services.blobs, owner, objective)

    def ids_in(session: Session) -> FilesOfJob:
        objective_id = None if objective_of is None else objective_of(session)
        return FilesOfJob(model_of(session), dataset_of(session), objective_id)

    return ids_in


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
    files: FilesOfJob,
    queue: str,
) -> jobs.NewJob:
    """The job that a submission asks for, under the limits that the service has now."""
    resolved = with_module(resolve_at_submit(spec), files.objective_model_id)
    return jobs.NewJob(
        id=job_id,
        owner=submission.owner,
        name=submission.name,
        model_id=files.model_id,
        dataset_id=files.dataset_id,
        objective_model_id=files.objective_model_id,
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
    dataset = submission.dataset
    for model in (submission.model, submission.objective):
        if isinstance(model, str):
            existing_model(session, submission.owner, model)
    if isinstance(dataset, str):
        existing_dataset(session, submission.owner, dataset)


def _fingerprint(submission: Submission) -> str:
    """One digest of all that a request asks for; file names are not part of it."""

    def said(file: ReceivedFile | str | None) -> str | None:
        return f"sha256:{file.sha256}" if isinstance(file, ReceivedFile) else file

    asked: list[object] = [said(submission.model), said(submission.dataset)]
    asked += [submission.requested_spec, submission.name]
    if isinstance(submission.objective, ReceivedFile):  # an id stands in the spec
        asked.append(said(submission.objective))
    return hashlib.sha256(canonical(asked)).hexdigest()


def canonical(value: object) -> bytes:
    """The one way to write a JSON value down."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
