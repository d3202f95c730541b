"""Short ways to put jobs into a database and to take them."""

import hashlib

from sqlalchemy import text

from service.contract.ids import JOB, new_id
from service.jobs.files import ReceivedFile
from service.services import Services
from service.store.attempts import Claim, claim
from service.store.jobs import NewJob, insert_job
from service.store.models import upsert_model
from service.store.session import Database
from service.store.tables import Base

OWNER = "owner"
QUEUE = "cpu"


def submit_job(database: Database, *, owner: str = OWNER, content: str = "a model", **values: object) -> str:
    """Insert a model and a job of it, and commit."""
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    fields = {
        "id": new_id(JOB),
        "owner": owner,
        "dataset_id": None,
        "requested_spec": {"budget": {"max_macs_fraction": 0.3}},
        "spec": {"budget": {"max_macs_fraction": 0.3}, "seed": 0},
        "spec_sha256": "0" * 64,
        "queue": QUEUE,
        "max_attempts": 3,
        "run_seconds_limit": 3600.0,
    } | values
    with database.write() as session:
        model = upsert_model(session, owner, "net.pt", sha256, len(content), f"sha256/{sha256[:2]}/{sha256[2:]}")
        insert_job(session, NewJob(model_id=model.id, **fields))  # type: ignore[arg-type]
    return str(fields["id"])


def claim_job(database: Database, *, lease_seconds: float = 30.0, worker_id: str = "worker") -> Claim | None:
    with database.write() as session:
        return claim(session, queue=QUEUE, worker_id=worker_id, host="host", pid=1, lease_seconds=lease_seconds)


def empty(database: Database) -> None:
    tables = [table.name for table in reversed(Base.metadata.sorted_tables)]
    with database.write() as session:
        for name in tables:
            session.execute(text(f"DELETE FROM {name}"))


def received(services: Services, content: bytes, name: str | None = "net.pt") -> ReceivedFile:
    """A file that was sent whole, and is not in the store yet."""
    with services.blobs.writer(limit_bytes=10**6) as writer:
        writer.write(content)
        return ReceivedFile(name, "torchscript", writer.finish())
