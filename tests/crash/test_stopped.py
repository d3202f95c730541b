"""Processes that are stopped and go on later, as a virtual machine that was paused: their late writes do not count."""

import os
import signal
import time

import psutil
import pytest
from fleet import SCALED
from processes import lives
from scripts import chain

from service.contract.states import AttemptOutcome, JobState

STEPS = 16  # of a twelfth of a lease each
SETTINGS = pytest.mark.parametrize(
    "settings", [SCALED, pytest.param({}, marks=pytest.mark.full)], ids=["scaled", "production"]
)


def with_a_running_job(make_fleet, settings, machines=2):
    fleet = make_fleet(settings)
    fleet.add_service()
    for _ in range(machines):
        fleet.add_machine()
    fleet.wait_for_workers(machines)
    job_id = fleet.submit(chain(STEPS, fleet.settings.lease_seconds / 12))
    fleet.wait_for_checkpoint(job_id)
    child = next(note["pid"] for note in fleet.notes(job_id) if note["what"] == "start")
    return fleet, job_id, psutil.Process(child)


@SETTINGS
@pytest.mark.parametrize("child_too", [True, False], ids=["both", "supervisor"])
def test_a_ghost_writes_nothing(make_fleet, settings, child_too):
    fleet, job_id, child = with_a_running_job(make_fleet, settings)
    ghost = fleet.machine_of(job_id)
    (other,) = [machine for machine in fleet.machines if machine is not ghost]
    os.kill(ghost.pid, signal.SIGSTOP)
    if child_too:
        child.suspend()
    if not child_too:  # a child that does not hear of its supervisor ends itself, before another can begin
        fleet.wait(lambda: not lives(child), fleet.settings.lease_seconds, "the child has ended itself")
    fleet.wait_for_epoch(job_id, 2, seconds=fleet.settings.reap_seconds * 3)
    assert fleet.machine_of(job_id) is other
    before = fleet.counter("fenced_writes_refused")
    overtaken = fleet.job(job_id).lease_epoch
    if child_too:
        child.resume()  # the first, for its supervisor kills it as soon as it can
    os.kill(ghost.pid, signal.SIGCONT)
    resumed_at = time.monotonic()
    fleet.wait(lambda: not lives(child), fleet.settings.heartbeat_seconds + 2, "the ghost's child is dead")
    print(f"the ghost's child was dead {time.monotonic() - resumed_at:.2f} s after it went on")
    fleet.wait(lambda: fleet.counter("fenced_writes_refused") > before, 15, "the refused write is counted")
    fleet.wait_for_end([job_id], 120)
    fleet.check([job_id], children_may_meet=child_too)
    assert fleet.job(job_id).lease_epoch == overtaken
    assert [one.outcome for one in fleet.attempts(job_id)] == [AttemptOutcome.LOST, AttemptOutcome.SUCCEEDED]
    fleet.check_equal(job_id, chain(STEPS, 0.0))
    fleet.check_works_on(ghost, other, chain(2, 0.0))


@SETTINGS
def test_a_stopped_child_keeps_its_job(make_fleet, settings):
    fleet, job_id, child = with_a_running_job(make_fleet, settings)
    child.suspend()
    until = time.monotonic() + fleet.settings.reap_seconds + 2 * fleet.settings.reconcile_seconds
    fleet.wait(lambda: time.monotonic() > until, until, "the time after which a lease would be lost")
    row = fleet.job(job_id)
    assert (row.state, row.lease_epoch) == (JobState.RUNNING, 1)
    child.resume()
    fleet.wait_for_end([job_id], 120)
    fleet.check([job_id])
    assert len(fleet.attempts(job_id)) == 1


def test_a_stopped_child_is_canceled(make_fleet):
    from service.store.jobs import request_cancel

    fleet, job_id, child = with_a_running_job(make_fleet, SCALED, machines=1)
    child.suspend()
    with fleet.database.write() as session:
        request_cancel(session, job_id, None)
    grace = fleet.settings.cancel_grace_seconds
    fleet.wait_for_state(job_id, JobState.CANCELED, seconds=grace + 3)
    assert not lives(child)
