"""The fence: what an attempt writes counts only while the job row still carries its epoch."""

from sqlalchemy import ColumnElement, and_, literal_column, select
from sqlalchemy.orm import Session

from service.contract.states import JobState
from service.store.tables import Job


def leased(job_id: str, epoch: int) -> ColumnElement[bool]:
    """The condition that this attempt is the job's live one."""
    return and_(Job.id == job_id, Job.lease_epoch == epoch, Job.state == JobState.RUNNING)


def waiting(jobs: type[Job] = Job) -> ColumnElement[bool]:
    """The condition that a job is queued, spelt out: the partial index of the queue serves no parameter."""
    return jobs.state == literal_column(f"'{JobState.QUEUED}'")


def hold_lease(session: Session, job_id: str, epoch: int) -> bool:
    """Lock the job row if the attempt is its live one; its epoch then stands until the transaction ends.

    An INSERT that only selects from the row could commit after another transaction had moved the epoch on; the lock
    (on SQLite the write transaction itself) closes that gap.
    """
    query = select(Job.id).where(leased(job_id, epoch)).with_for_update()
    return session.execute(query).first() is not None
