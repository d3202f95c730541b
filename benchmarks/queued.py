"""Many jobs in a database, put there quickly: what a long queue looks like."""

from typing import Any

from sqlalchemy import insert

from service.contract.ids import JOB, new_id
from service.contract.resolve import resolve_at_submit
from service.contract.spec import parse_spec
from service.store.jobs import NewJob
from service.store.models import upsert_model
from service.store.session import Database
from service.store.tables import Job
from service.store.time import database_time

OWNER = "default"
REQUESTED: dict[str, Any] = {"budget": {"max_macs_fraction": 0.5}}
_AT_ONCE = 500


def add_model(database: Database) -> str:
    """A model's row, without its file."""
    with database.write() as session:
        return upsert_model(session, OWNER, "net.pt", "0" * 64, 1, "sha256/00/0").id


def new_job(model_id: str) -> NewJob:
    """A job as a submission makes it."""
    return NewJob(
        id=new_id(JOB),
        owner=OWNER,
        model_id=model_id,
        dataset_id=None,
        requested_spec=REQUESTED,
        spec=resolve_at_submit(parse_spec(REQUESTED)),
        spec_sha256="0" * 64,
        queue="cpu",
        max_attempts=3,
        run_seconds_limit=3600.0,
    )


def fill(database: Database, model_id: str, count: int, *, state: str = "queued") -> list[str]:
    """Insert so many jobs in a state, oldest first; returns their ids."""
    values = vars(new_job(model_id)) | {"state": state, "progress": {"fraction": 0.25}}
    del values["queue_seconds"]
    if state == "running":
        values |= {"attempt": 1, "lease_epoch": 1, "lease_owner": "nobody", "phase": "learning"}
    job_ids = [new_id(JOB) for _ in range(count)]
    lease = database_time(3600.0) if state == "running" else None
    for start in range(0, count, _AT_ONCE):
        rows = [values | {"id": job_id} for job_id in job_ids[start : start + _AT_ONCE]]
        with database.write() as session:
            session.execute(insert(Job).values(lease_expires_at=lease), rows)
    return job_ids
