"""The worker inside the service's process: Celery itself, on a broker in memory."""

import time

import pytest
from house import FAKE_RUNNER

from service.contract.states import AttemptOutcome, JobState
from service.store import attempts
from service.store.workers import list_workers
from worker.embedded import EmbeddedWorker


@pytest.fixture
def start_worker():
    started = []

    def starter(house):
        worker = EmbeddedWorker(house.services, child_command=FAKE_RUNNER)
        worker.start()
        started.append(worker)
        return worker

    yield starter
    for worker in started:
        worker.stop()


def test_a_bell_starts_a_waiting_job_within_a_second(house, start_worker):
    start_worker(house)
    job_id = house.submit({"learn": [["sleep", 0.3], ["steps", 1, 0.0]]})
    rung = time.monotonic()
    house.bell.ring("cpu")
    house.wait_for_state(job_id, JobState.RUNNING)
    assert time.monotonic() - rung < 1.0
    house.wait_for_state(job_id, JobState.SUCCEEDED)


def test_one_bell_runs_every_waiting_job(house, start_worker):
    jobs = [house.submit({}) for _ in range(3)]
    start_worker(house)
    for job_id in jobs:
        house.wait_for_state(job_id, JobState.SUCCEEDED)


def test_bells_without_jobs_and_doubled_bells_are_harmless(house, start_worker):
    start_worker(house)
    house.bell.ring("cpu", 5)
    job_id = house.submit({})
    house.bell.ring("cpu", 5)
    house.wait_for_state(job_id, JobState.SUCCEEDED)
    assert len(house.attempts(job_id)) == 1


def test_as_many_jobs_run_at_once_as_there_are_slots(make_house, start_worker):
    house = make_house(slots=2)
    start_worker(house)
    jobs = [house.submit({"learn": [["phase", "learning"], ["sleep", 60]]}) for _ in range(3)]
    house.bell.ring("cpu", 3)
    for job_id in jobs[:2]:
        house.wait_for_phase(job_id, "learning")
    assert house.job(jobs[2]).state == JobState.QUEUED
    with house.database.read() as session:
        (row,) = list_workers(session)
    assert row.slots == 2
    house.cancel(jobs[0])
    house.wait_for_phase(jobs[2], "learning")


def test_a_stop_is_prompt_and_gives_the_job_back(house, start_worker):
    worker = start_worker(house)
    job_id = house.submit({"learn": [["checkpoint_on_drain", 2], ["phase", "learning"], ["sleep", 60]]})
    house.bell.ring("cpu")
    house.wait_for_phase(job_id, "learning")
    asked = time.monotonic()
    worker.stop()
    assert time.monotonic() - asked < 5.0
    job = house.job(job_id)
    assert (job.state, job.attempt) == (JobState.QUEUED, 0)
    assert house.attempts(job_id)[0].outcome == AttemptOutcome.DRAINED
    with house.database.read() as session:
        assert list_workers(session) == []


def test_a_start_takes_back_what_an_earlier_process_left(house, start_worker):
    job_id = house.submit({})
    with house.database.write() as session:
        attempts.claim(session, queue="cpu", worker_id="wrk_old", host="h", pid=1, lease_seconds=30.0)
    (house.settings.scratch_dir / job_id / "1").mkdir(parents=True)
    start_worker(house)
    house.wait_for_state(job_id, JobState.SUCCEEDED)
    assert [one.epoch for one in house.attempts(job_id)] == [1, 2]
    assert not list(house.settings.scratch_dir.rglob(f"{job_id}/1"))


def test_a_stopped_worker_can_be_followed_by_another(make_house, start_worker):
    first = make_house()
    start_worker(first).stop()
    second = make_house()
    start_worker(second)
    job_id = second.submit({})
    second.bell.ring("cpu")
    second.wait_for_state(job_id, JobState.SUCCEEDED)
