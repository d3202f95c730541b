"""Deleting jobs, uploaded files and artifacts; what a waiting or running job needs is refused."""

from collections.abc import Callable

from sqlalchemy.orm import Session

from service.contract.errors import ErrorCode, ProblemError
from service.jobs.read import not_found
from service.orphans import delete_dropped, settled_seconds
from service.services import Services
from service.store import deletion
from service.store.deletion import Deleted, InUse

_Delete = Callable[[Session, str, str], Deleted | InUse | None]


def delete_job(services: Services, owner: str, job_id: str) -> None:
    """Delete an ended job with its history, checkpoints and artifacts."""
    _delete(services, deletion.delete_job, "job", job_id, owner)


def delete_model(services: Services, owner: str, model_id: str) -> None:
    """Delete a model; jobs that have ended keep its id."""
    _delete(services, deletion.delete_model, "model", model_id, owner)


def delete_dataset(services: Services, owner: str, dataset_id: str) -> None:
    """Delete a dataset; jobs that have ended keep its id."""
    _delete(services, deletion.delete_dataset, "dataset", dataset_id, owner)


def delete_artifact(services: Services, owner: str, artifact_id: str) -> None:
    """Delete one file that a job produced; the job stays."""
    _delete(services, deletion.delete_artifact, "artifact", artifact_id, owner)


def _delete(services: Services, delete: _Delete, what: str, id_: str, owner: str) -> None:
    with services.database.write() as session:
        outcome = delete(session, id_, owner)
    if outcome is None:
        raise not_found(what, id_)
    if isinstance(outcome, InUse):
        wanted = "a job that has ended" if what == "job" else f"a {what} that no waiting or running job needs"
        raise ProblemError(
            ErrorCode.STATE_CONFLICT,
            f"expected {wanted}; job {outcome.job_id} is {outcome.state}: cancel it first, or wait for its end",
        )
    delete_dropped(services.database, services.blobs, outcome.keys, settled_seconds(services.settings))
