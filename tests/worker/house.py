"""A small service without HTTP: settings with quick timings, a database, a blob store, and jobs with scripts."""

import hashlib
import json
import shutil
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from service.bell import Bell, make_celery
from service.blobs.store import BlobStore
from service.contract.ids import JOB, new_id
from service.services import Services
from service.settings import Settings
from service.store import jobs
from service.store.datasets import upsert_dataset
from service.store.events import list_events
from service.store.migration import migrate
from service.store.models import upsert_model
from service.store.session import Database
from service.store.tables import Attempt
from worker.slots import Slots
from worker.supervisor import Supervisor

FAKE_RUNNER = [sys.executable, str(Path(__file__).with_name("fake_runner.py"))]
QUICK = {
    "heartbeat_seconds": 0.2,
    "self_fence_seconds": 2.0,
    "lease_seconds": 3.0,
    "reap_seconds": 4.0,
    "reconcile_seconds": 0.3,
    "cancel_grace_seconds": 1.0,
    "drain_grace_seconds": 2.0,
    "retry_base_seconds": 0.0,
    "max_attempts": 2,
    "slots": 1,
    "threads": 1,
    "child_memory_bytes": 2**30,
}


@dataclass
class House:
    """Everything a worker needs, and what tests ask of it."""

    data_dir: Path
    changes: dict = field(default_factory=dict)
    gpus: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.settings = Settings(**{"data_dir": self.data_dir, **QUICK, **self.changes})
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self.database = Database(self.settings.resolved_database_url)
        self.blobs = BlobStore(self.settings.resolved_blob_url)
        self.bell = Bell(make_celery(self.settings))
        self.services = Services(self.settings, self.database, self.blobs, self.bell, "a-key-of-sixteen-characters")
        self.supervisor = self.another_supervisor()

    def another_supervisor(self, command=FAKE_RUNNER):
        slots = Slots(self.settings, gpus=self.gpus)
        return Supervisor(self.settings, self.database, self.blobs, slots, "wrk_test", child_command=command)

    def close(self):
        self.database.dispose()

    def put(self, content: bytes) -> tuple[str, str, int]:
        with self.blobs.writer(limit_bytes=2**30) as writer:
            writer.write(content)
            staged = writer.finish()
        return staged.sha256, self.blobs.keep(staged), staged.bytes

    def submit(self, script, *, spec=None, dataset=None, run_seconds=60.0, name="digits.pt", queue="cpu", **more):
        """A job whose child does what the script says."""
        spec = {"budget": {"max_macs_fraction": 0.5}, "device": "cpu", **(spec or {})}
        sha256, key, size = self.put(json.dumps({**script, "unique": new_id(JOB)}).encode())
        job_id = new_id(JOB)
        data = self.put(dataset) if dataset is not None else None
        with self.database.write() as session:
            model = upsert_model(session, "default", name, sha256, size, key)
            row = None if data is None else upsert_dataset(session, "default", "d", "npz", data[0], data[2], data[1])
            jobs.insert_job(
                session,
                jobs.NewJob(
                    id=job_id,
                    owner="default",
                    model_id=model.id,
                    dataset_id=None if row is None else row.id,
                    requested_spec=spec,
                    spec=spec,
                    spec_sha256=hashlib.sha256(json.dumps(spec).encode()).hexdigest(),
                    queue=queue,
                    device=spec["device"],
                    max_attempts=self.settings.max_attempts,
                    run_seconds_limit=run_seconds,
                    **more,
                ),
            )
        return job_id

    def run(self):
        """Run the next job in this thread."""
        return self.supervisor.run_next()

    def run_aside(self, supervisor=None):
        """Run the next job in another thread."""
        chosen = supervisor or self.supervisor
        thread = threading.Thread(target=chosen.run_next, daemon=True)
        thread.start()
        return thread

    def job(self, job_id):
        with self.database.read() as session:
            return jobs.get_job(session, job_id, None)

    def events(self, job_id, kind=None):
        with self.database.read() as session:
            lines = list_events(session, job_id, 0, 100_000)
        return [line.data for line in lines if kind is None or line.kind == kind]

    def attempts(self, job_id):
        with self.database.read() as session:
            return list(session.query(Attempt).filter(Attempt.job_id == job_id).order_by(Attempt.epoch))

    def cancel(self, job_id):
        with self.database.write() as session:
            return jobs.request_cancel(session, job_id, None)

    def wait(self, condition, seconds=20.0):
        until = time.monotonic() + seconds
        while not (answer := condition()):
            assert time.monotonic() < until, "what was waited for did not come"
            time.sleep(0.02)
        return answer

    def wait_for_state(self, job_id, *states, seconds=20.0):
        def reached():
            row = self.job(job_id)
            return row if row.state in states else None

        return self.wait(reached, seconds)

    def wait_for_phase(self, job_id, phase, seconds=20.0):
        return self.wait(lambda: {"phase": phase} in self.events(job_id, "phase"), seconds)


def make_template(folder: Path) -> Path:
    """A migrated database file, to be copied by every test."""
    house = House(folder)
    migrate(house.database)
    house.close()
    return folder / "rankpress.db"


def build(template: Path, folder: Path, **changes) -> House:
    """A house of its own in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(template, folder / "rankpress.db")
    return House(folder, changes)
