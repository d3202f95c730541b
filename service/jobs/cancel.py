"""Canceling a job."""

from service.contract.errors import ErrorCode, ProblemError
from service.contract.resources import JobResource
from service.jobs.read import existing_job, not_found
from service.services import Services
from service.store import jobs


def cancel_job(services: Services, owner: str, job_id: str) -> JobResource:
    """Cancel a waiting job at once, and ask the worker of a running one to stop it within seconds.

    Safe to repeat. A job that has succeeded or failed is refused with `STATE_CONFLICT`.
    """
    with services.database.write() as session:
        outcome = jobs.request_cancel(session, job_id, owner)
        if outcome is jobs.CancelOutcome.NOT_FOUND:
            raise not_found("job", job_id)
        row = existing_job(session, owner, job_id)
        if outcome is jobs.CancelOutcome.FINISHED:
            raise ProblemError(
                ErrorCode.STATE_CONFLICT, f"job {job_id} has {row.state}; only a job that waits or runs can be canceled"
            )
        return jobs.job_resource(row, jobs.queue_position(session, row))
