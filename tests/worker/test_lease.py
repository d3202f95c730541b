"""The lease: what holds when the database is away, slow, or another's."""

import threading
import time

import psutil
import pytest
from sqlalchemy.exc import OperationalError

from service.contract.states import AttemptOutcome, JobState
from service.store import attempts
from service.store.counters import FENCED_WRITES_REFUSED, read_counters
from worker.endings import LeaseLostError, StopAskedError
from worker.lease import Fence, Lease


class Guarded:
    def __init__(self):
        self.killed = threading.Event()

    def signal_group(self, number):
        self.killed.set()

    def show_life(self):
        self.shown = True


@pytest.fixture
def claimed(house):
    """A claimed job's lease, with a fence so far away that only the test moves it."""
    house.submit({})
    with house.database.write() as session:
        claim = attempts.claim(session, queue="cpu", worker_id="w", host="h", pid=1, lease_seconds=3.0)
    lease = Lease(house.database, house.settings, claim, time.monotonic())
    yield claim, lease
    lease.fence.close()


def break_database(house, monkeypatch, *, hang_seconds=0.0):
    def away(*_args, **_kwargs):
        time.sleep(hang_seconds)
        raise OperationalError("SELECT 1", {}, Exception("the database is away"))

    monkeypatch.setattr(house.database, "write", away)


def test_the_fence_kills_without_the_supervising_thread():
    fence, child = Fence(0.2, time.monotonic()), Guarded()
    fence.guard(child)
    assert child.killed.wait(1.0)
    assert fence.passed


def test_a_confirmed_heartbeat_moves_the_fence_from_when_it_was_sent():
    start = time.monotonic()
    fence, child = Fence(0.4, start), Guarded()
    fence.guard(child)
    time.sleep(0.2)
    fence.confirm(start + 0.1)
    assert child.killed.wait(1.0)
    assert child.shown
    assert 0.45 < time.monotonic() - start < 0.8


def test_a_closed_fence_kills_nothing():
    fence, child = Fence(0.1, time.monotonic()), Guarded()
    fence.guard(child)
    fence.close()
    assert not child.killed.wait(0.3)


def test_a_child_that_starts_after_the_fence_is_killed_at_once():
    fence, child = Fence(0.01, time.monotonic()), Guarded()
    time.sleep(0.1)
    fence.guard(child)
    assert child.killed.is_set()


def test_a_heartbeat_shows_phase_and_progress_and_brings_the_cancel(house, claimed):
    claim, lease = claimed
    lease.enter("learning")
    house.cancel(claim.job_id)
    time.sleep(0.25)
    lease.beat_if_due()
    assert lease.cancel_requested
    assert house.job(claim.job_id).phase == "learning"


def test_a_write_outlives_a_short_absence_of_the_database(house, claimed, monkeypatch):
    claim, lease = claimed
    with monkeypatch.context() as patch:
        break_database(house, patch)
        threading.Timer(0.5, patch.undo).start()
        lease.write(lambda session: attempts.set_resolved_spec(session, claim.job_id, claim.epoch, {"seed": 1}))
    assert house.job(claim.job_id).spec == {"seed": 1}


def test_past_the_fence_nothing_is_written_although_the_database_is_back(house, claimed):
    _, lease = claimed
    lease.fence.passed = True
    for act in (lease.beat_if_due, lambda: lease.write(lambda session: True)):
        with pytest.raises(LeaseLostError):
            act()


def test_a_refused_write_is_a_lost_lease(claimed):
    _, lease = claimed
    for answer in (None, False):
        with pytest.raises(LeaseLostError):
            lease.write(lambda session, answer=answer: answer)


def test_heartbeats_go_on_while_bytes_are_moved(house, claimed):
    claim, lease = claimed
    before = house.job(claim.job_id).lease_expires_at
    assert lease.hold_while(lambda: time.sleep(0.7) or "moved") == "moved"
    assert (house.job(claim.job_id).lease_expires_at - before).total_seconds() > 0.4


@pytest.mark.parametrize("hang_seconds", [0.0, 3.0])
def test_without_the_database_the_child_dies_before_the_lease_ends(house, tmp_path, monkeypatch, hang_seconds):
    pid_file = tmp_path / "pid"
    job_id = house.submit({"learn": [["write_pid", str(pid_file)], ["phase", "learning"], ["sleep", 60]]})
    thread = house.run_aside()
    house.wait_for_phase(job_id, "learning")
    pid = int(pid_file.read_text())
    with monkeypatch.context() as patch:
        break_database(house, patch, hang_seconds=hang_seconds)
        cut = time.monotonic()
        house.wait(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
        assert time.monotonic() - cut < house.settings.lease_seconds
        thread.join(5)
    assert not thread.is_alive()
    assert house.job(job_id).state == JobState.RUNNING  # the reconciler's, once the lease has run out


def test_the_database_away_at_the_end_delays_the_end(house, monkeypatch):
    job_id = house.submit({"verify": [["sleep", 0.6], ["verify"]]})
    thread = house.run_aside()
    house.wait_for_phase(job_id, "verifying")
    with monkeypatch.context() as patch:
        break_database(house, patch)
        time.sleep(1.0)
    thread.join(5)
    assert house.job(job_id).state == JobState.SUCCEEDED


def refused(house):
    with house.database.read() as session:
        return read_counters(session).get(FENCED_WRITES_REFUSED, {}).get("", 0.0)


def requeue_of(claim):
    def requeue(session):
        lost = AttemptOutcome.LOST
        return attempts.requeue(session, claim.job_id, claim.epoch, outcome=lost, delay_seconds=0, counted=True)

    return requeue


def test_a_write_that_is_refused_is_counted(house, claimed):
    claim, lease = claimed
    lease.write(requeue_of(claim))
    assert refused(house) == 0
    with pytest.raises(LeaseLostError):
        lease.write(requeue_of(claim))
    assert refused(house) == 1
    lease.let_go(requeue_of(claim))  # the loss was noticed by a write, which is counted already
    assert refused(house) == 1


def test_a_ghost_frees_what_nobody_has_taken_and_is_refused_where_another_has(house, claimed):
    claim, lease = claimed
    lease.fence.passed = True
    lease.let_go(requeue_of(claim))
    assert (house.job(claim.job_id).state, refused(house)) == (JobState.QUEUED, 0)
    with house.database.write() as session:
        attempts.claim(session, queue="cpu", worker_id="w2", host="h", pid=1, lease_seconds=3.0)
    lease.let_go(requeue_of(claim))
    assert (house.job(claim.job_id).state, refused(house)) == (JobState.RUNNING, 1)


def test_a_cancel_ends_the_wait_for_slow_bytes(house, claimed):
    claim, lease = claimed
    house.cancel(claim.job_id)
    enough = threading.Event()

    def go_on():
        if lease.cancel_requested:
            raise StopAskedError

    began = time.monotonic()
    with pytest.raises(StopAskedError):
        lease.hold_while(enough.wait, go_on)
    assert time.monotonic() - began < 2
    enough.set()
