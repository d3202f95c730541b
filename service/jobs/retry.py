"""Trying a failed or canceled job again: a new job, for the end of a job is final."""

import hashlib
from dataclasses import replace

from sqlalchemy.orm import Session

from service.contract.errors import ErrorCode, ProblemError
from service.contract.events import EventKind
from service.contract.spec import parse_spec
from service.contract.states import JobState
from service.jobs import idempotency
from service.jobs.read import existing_job, read_job
from service.jobs.submit import Accepted, FilesOfJob, Submission, accept, canonical, new_job, queue_for
from service.services import Services
from service.store import jobs
from service.store.checkpoints import copy_checkpoints
from service.store.datasets import get_dataset
from service.store.events import append_events
from service.store.idempotency import Fresh, Replay
from service.store.models import get_model
from service.store.ranks import copy_rank_rows
from service.store.tables import Job


def retry_job(services: Services, owner: str, job_id: str, *, from_start: bool, key: Fresh | Replay | None) -> Accepted:
    """Start a new job with the model, dataset and spec of one that failed or was canceled.

    It goes on from that job's last checkpoint, if one is kept and the spec still resolves to the same values. When this
    returns, the new job is durable; what a raised error means is the same as for `submit`.
    """
    fingerprint = hashlib.sha256(canonical(["retry", job_id, from_start])).hexdigest()
    if isinstance(key, Replay):
        idempotency.check_same(key, fingerprint)
        return Accepted(read_job(services, owner, key.job_id), replayed=True)

    def insert(session: Session, new_id: str) -> str:
        old = existing_job(session, owner, job_id)
        _check_state(old)
        _hold_files(session, old)
        return _insert(session, services, old, new_id, from_start=from_start)

    return accept(services, owner, insert, key, fingerprint)


def _check_state(job: Job) -> None:
    state = JobState(job.state)
    if state is JobState.SUCCEEDED:
        raise ProblemError(
            ErrorCode.STATE_CONFLICT,
            f"expected a job that failed or was canceled; job {job.id} has succeeded: submit it anew for another run",
        )
    if not state.terminal:
        raise ProblemError(
            ErrorCode.STATE_CONFLICT,
            f"expected a job that failed or was canceled; job {job.id} is {state}: cancel it first, or wait "
            "for its end",
        )


def _hold_files(session: Session, job: Job) -> None:
    """Keep the models and the dataset from being deleted until the new job names them too."""
    if get_model(session, job.model_id, job.owner, lock=True) is None:
        raise _deleted("model", job.model_id, job.id)
    objective_id = job.objective_model_id
    if objective_id is not None and get_model(session, objective_id, job.owner, lock=True) is None:
        raise _deleted("model", objective_id, job.id)
    if job.dataset_id is not None and get_dataset(session, job.dataset_id, job.owner, lock=True) is None:
        raise _deleted("dataset", job.dataset_id, job.id)


def _deleted(what: str, file_id: str, job_id: str) -> ProblemError:
    return ProblemError(
        ErrorCode.STATE_CONFLICT,
        f"expected the {what} {file_id} of job {job_id}; it was deleted: upload the same file again, which brings it "
        "back under its id, and retry",
    )


def _insert(session: Session, services: Services, old: Job, new_id: str, *, from_start: bool) -> str:
    """Write the new job, its checkpoints and where it begins; returns its queue."""
    spec = parse_spec(old.requested_spec)
    queue = queue_for(session, spec)
    submission = Submission(
        owner=old.owner,
        name=old.name,
        requested_spec=old.requested_spec,
        model=old.model_id,
        dataset=old.dataset_id,
        objective=old.objective_model_id,
    )
    files = FilesOfJob(old.model_id, old.dataset_id, old.objective_model_id)
    job = new_job(services.settings, submission, spec, new_id, files, queue)
    jobs.insert_job(session, replace(job, retry_of=old.id))
    begins = "from the start"
    if not from_start and job.spec_sha256 == old.spec_sha256:
        checkpoint = copy_checkpoints(session, old.id, new_id)
        if checkpoint is not None:
            copy_rank_rows(session, old.id, new_id)
            begins = f"from its checkpoint at update {checkpoint.position}"
    message = f"retry of job {old.id}, {begins}"
    append_events(session, new_id, None, [(EventKind.LOG, {"level": "info", "message": message})])
    return queue
