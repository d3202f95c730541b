"""Deadlines, priorities, and the clock: what waits too long ends, whatever the time on this machine."""

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from sqlalchemy import update
from submissions import claim_job, submit_job

from service.contract.ids import WORKER, new_id
from service.contract.states import AttemptOutcome, JobState
from service.reconcile import Reconciler
from service.store.attempts import count_claimable, heartbeat, requeue
from service.store.counters import read_counters
from service.store.deadlines import fail_unbegun, fail_used_up
from service.store.events import list_events
from service.store.jobs import get_job, queue_position, request_cancel
from service.store.tables import Attempt, Job
from service.store.time import database_time
from service.store.workers import register_worker

MINUTES = 60.0


@pytest.fixture
def sweeper(services):
    return Reconciler(services.database, services.bell, services.settings, services.blobs)


def job(database, job_id):
    with database.read() as session:
        return get_job(session, job_id, None)


def states(database, job_id):
    with database.read() as session:
        return [event.data["state"] for event in list_events(session, job_id, 0, 100) if event.kind == "state"]


def set_values(database, job_id, **values):
    with database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(values))


def end_attempt(database, claimed, seconds, outcome=AttemptOutcome.CRASHED):
    """End the attempt as if it had run for so long."""
    with database.write() as session:
        began = update(Attempt).where(Attempt.job_id == claimed.job_id, Attempt.epoch == claimed.epoch)
        session.execute(began.values(started_at=database_time(-seconds)))
        return requeue(session, claimed.job_id, claimed.epoch, outcome=outcome, delay_seconds=0, counted=False)


def past_queue_deadline(database, **values):
    job_id = submit_job(database, queue_seconds=60, **values)
    set_values(database, job_id, created_at=database_time(-90), queue_expires_at=database_time(-30))
    return job_id


@pytest.mark.parametrize(
    ("workers", "found"),
    [
        (0, "which no live worker serves: start one with `rankpress worker --queue cpu`"),
        (1, "which 1 live worker serves, busy with others"),
        (2, "which 2 live workers serve, busy with others"),
    ],
)
def test_a_job_that_does_not_begin_in_time_fails(database, sweeper, workers, found):
    late, patient = past_queue_deadline(database), submit_job(database, queue_seconds=60)
    with database.write() as session:
        for _ in range(workers):
            register_worker(session, new_id(WORKER), host="h", pid=1, queues=["cpu"], slots=1)
        register_worker(session, new_id(WORKER), host="h", pid=1, queues=["gpu"], slots=1)
        assert count_claimable(session, "cpu") == 1
    assert sweeper.overdue_jobs() == 1
    assert sweeper.overdue_jobs() == 0
    row = job(database, late)
    assert (row.state, row.problem["code"]) == ("failed", "TIMEOUT")
    said = row.problem["detail"]
    assert "deadlines.queue_seconds = 60 s; it waited 90.0 s in the queue cpu" in said or "waited 90.1 s" in said
    assert found in said
    assert states(database, late) == ["queued", "failed"]
    assert job(database, patient).state == "queued"


def test_a_job_past_its_queue_deadline_is_not_claimed(database):
    past_queue_deadline(database)
    assert claim_job(database) is None


def test_the_queue_deadline_ends_with_the_first_attempt(database):
    job_id = submit_job(database, queue_seconds=60)
    end_attempt(database, claim_job(database), 1)
    set_values(database, job_id, queue_expires_at=database_time(-30))
    with database.write() as session:
        assert fail_unbegun(session) == []
    assert claim_job(database).job_id == job_id


def test_run_seconds_hold_over_attempts_that_were_killed(database):
    job_id = submit_job(database, run_seconds_limit=100)
    for expected in (0, 40, 80):
        claimed = claim_job(database)
        assert claimed.run_seconds_used == pytest.approx(expected, abs=1)
        with database.write() as session:
            assert fail_used_up(session) == []
        assert end_attempt(database, claimed, 40) is JobState.QUEUED
    assert claim_job(database) is None
    with database.write() as session:
        assert fail_used_up(session) == [job_id]
    row = job(database, job_id)
    assert (row.state, row.problem["code"]) == ("failed", "TIMEOUT")
    assert "deadlines.run_seconds = 100 s; its attempts ran for 120." in row.problem["detail"]


def test_a_cancel_goes_before_a_deadline(database):
    job_id = past_queue_deadline(database)
    with database.write() as session:
        request_cancel(session, job_id, None)
        assert fail_unbegun(session) == []
    assert job(database, job_id).state == "canceled"


def test_lower_priorities_run_first_and_equals_in_order(database):
    order = [submit_job(database, priority=priority) for priority in (0, 5, -100, 0, 100, -100)]
    expected = [order[place] for place in (2, 5, 0, 3, 1, 4)]
    with database.read() as session:
        found = {job_id: queue_position(session, get_job(session, job_id, None)) for job_id in order}
    assert sorted(found, key=found.__getitem__) == expected
    assert sorted(found.values()) == [1, 2, 3, 4, 5, 6]
    assert [claim_job(database).job_id for _ in order] == expected


def test_two_reconcilers_end_each_job_once(database, services):
    lost = [submit_job(database, max_attempts=1) for _ in range(6)]
    for _ in lost:
        claim_job(database, lease_seconds=-20)
    late = [past_queue_deadline(database) for _ in range(6)]
    flagged = [submit_job(database) for _ in range(6)]
    for job_id in flagged:
        set_values(database, job_id, cancel_requested_at=database_time())
    sweepers = [Reconciler(database, services.bell, services.settings, services.blobs) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(Reconciler.run_once, sweepers))
    for sweeper in sweepers:  # rows that were locked were passed over
        sweeper.run_once()
    assert not any(one[rule] for one in found for rule in ("lost_attempts",))
    for job_ids, ending in ((lost, "failed"), (late, "failed"), (flagged, "canceled")):
        for job_id in job_ids:
            assert states(database, job_id)[-1] == ending
            assert [later for earlier, later in pairwise(states(database, job_id)) if earlier == ending] == []
    with database.read() as session:
        counters = read_counters(session)
    assert counters["jobs_ended"] == {"failed": 12, "canceled": 6}
    assert counters["attempts_ended"] == {"lost": 6}
    assert counters["lease_expiries"] == {"": 6}


@pytest.mark.parametrize("minutes", [-5, 5])
def test_only_the_databases_clock_counts(database, sweeper, monkeypatch, minutes):
    true_time, true_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: true_time() + minutes * MINUTES)
    monkeypatch.setattr(time, "time_ns", lambda: true_ns() + int(minutes * MINUTES * 1e9))
    alive, silent = submit_job(database, queue_seconds=60), submit_job(database)
    for _ in range(2):
        claim_job(database, lease_seconds=30)
    set_values(database, silent, lease_expires_at=database_time(-20))
    waiting = submit_job(database, queue_seconds=60)
    late = past_queue_deadline(database)
    sweeper.run_once()
    assert [job(database, each).state for each in (alive, silent, waiting, late)] == [
        "running",
        "queued",
        "queued",
        "failed",
    ]
    with database.write() as session:
        assert heartbeat(session, alive, 1, lease_seconds=30) is not None
