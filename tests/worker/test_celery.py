"""A worker process of Celery's own, on a real broker and a real PostgreSQL."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from house import House

from service.contract.states import AttemptOutcome, JobState
from service.store.migration import migrate
from service.store.workers import list_workers


@pytest.fixture
def fleet(postgres_url, valkey_url, tmp_path):
    """The shared database and broker, and a way to start workers on them."""
    house = House(tmp_path / "data", {"database_url": postgres_url, "broker_url": valkey_url})
    migrate(house.database)
    environment = {
        **os.environ,
        "RANKPRESS_DATA_DIR": str(house.data_dir),
        "RANKPRESS_DATABASE_URL": postgres_url,
        "RANKPRESS_BROKER_URL": valkey_url,
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    workers = []

    def start_worker():
        command = [sys.executable, str(Path(__file__).with_name("celery_worker.py"))]
        log = (tmp_path / f"worker-{len(workers)}.log").open("wb")
        workers.append(
            subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=Path(__file__).parents[2])
        )
        house.wait(lambda: row_of(house, workers[-1]), seconds=30.0)
        return workers[-1]

    house.start_worker = start_worker
    yield house
    for worker in workers:
        worker.kill()
        worker.wait()
    house.close()


def row_of(house, worker):
    with house.database.read() as session:
        return next((row for row in list_workers(session, include_gone=True) if row.pid == worker.pid), None)


def test_a_job_runs_and_a_stop_hands_it_to_the_next_worker(fleet, tmp_path):
    worker = fleet.start_worker()
    first = fleet.submit({"learn": [["events", 20], ["layers"], ["ranks", 0, 1, True], ["steps", 2, 0.0]]})
    rung = time.monotonic()
    assert fleet.bell.ring("cpu")
    fleet.wait_for_state(first, JobState.SUCCEEDED, seconds=30.0)
    assert time.monotonic() - rung < 10

    learn = [["checkpoint_on_drain", 2], ["phase", "learning"], ["fresh", "sleep", 60], ["steps", 4, 0.0]]
    second = fleet.submit({"learn": learn})
    fleet.bell.ring("cpu")
    fleet.wait_for_phase(second, "learning")
    worker.terminate()
    worker.wait(15)
    job = fleet.job(second)
    assert (job.state, job.attempt) == (JobState.QUEUED, 0)
    assert row_of(fleet, worker).gone_at is not None

    fleet.start_worker()
    fleet.bell.ring("cpu")
    fleet.wait_for_state(second, JobState.SUCCEEDED, seconds=30.0)
    assert [one.outcome for one in fleet.attempts(second)] == [AttemptOutcome.DRAINED, AttemptOutcome.SUCCEEDED]
    assert [line["step"] for line in fleet.events(second, "step")] == [3, 4]


def test_words_that_postgresql_cannot_hold_end_the_attempt(postgres_url, valkey_url, tmp_path):
    house = House(tmp_path / "data", {"database_url": postgres_url, "broker_url": valkey_url})
    migrate(house.database)
    job_id = house.submit({"learn": [["layers", "nul \x00 here"], ["sleep", 2]]})
    while house.run():
        pass
    job = house.job(job_id)
    house.close()
    assert (job.state, job.problem["code"]) == (JobState.FAILED, "WORKER_LOST")
    assert "cannot be stored" in job.problem["detail"]
