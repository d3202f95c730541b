"""A worker that cannot reach the database any more: its child is dead before its lease ends, and another takes over."""

import time

import psutil
import pytest
from fleet import SCALED
from processes import lives
from proxy import Proxy
from scripts import chain
from sqlalchemy import select

from service.contract.states import AttemptOutcome
from service.store.tables import Job
from service.store.time import database_time

STEPS = 16  # of a twelfth of a lease each


@pytest.mark.parametrize("how", ["closed", "silent"])
@pytest.mark.parametrize("settings", [SCALED, pytest.param({}, marks=pytest.mark.full)], ids=["scaled", "production"])
def test_the_database_is_cut_from_one_worker(make_fleet, how, settings):
    fleet = make_fleet(settings)
    fleet.add_service()
    proxy = Proxy(fleet.database_url)
    cut_off = fleet.add_machine(DATABASE_URL=proxy.url)
    fleet.wait_for_workers(1)
    go = fleet.folder / "go"
    held = [["phase", "learning"], ["chain", 1, 0.0], ["wait_for", str(go)]]  # while the other machine starts
    job_id = fleet.submit({"learn": [*held, ["chain", STEPS, fleet.settings.lease_seconds / 12]]})
    fleet.wait_for_checkpoint(job_id)
    other = fleet.add_machine()
    fleet.wait_for_workers(2)
    go.touch()
    (child,) = [psutil.Process(note["pid"]) for note in fleet.notes(job_id) if note["what"] == "start"]
    assert lives(child)

    proxy.cut(how)
    cut_at = time.monotonic()
    while lives(child):
        left = lease_left(fleet, job_id)
        assert time.monotonic() < cut_at + fleet.settings.reap_seconds + 5, fleet.diagnosis([job_id])
        time.sleep(0.01)
    dead_after = time.monotonic() - cut_at
    # By the database's own clock, read before the child was found dead or after it.
    left = min(left, lease_left(fleet, job_id))
    print(f"cut ({how}): the child was dead after {dead_after:.2f} s, {left:.2f} s before its lease ended")
    assert left > 0
    assert dead_after <= fleet.settings.self_fence_seconds + 0.5

    fleet.wait_for_epoch(job_id, 2, seconds=fleet.settings.reap_seconds * 3)
    assert fleet.machine_of(job_id) is other
    assert cut_off.alive()
    fleet.wait_for_end([job_id], 120)
    proxy.mend()
    fleet.check([job_id])
    assert [one.outcome for one in fleet.attempts(job_id)] == [AttemptOutcome.LOST, AttemptOutcome.SUCCEEDED]
    fleet.check_equal(job_id, chain(STEPS, 0.0))
    fleet.check_works_on(cut_off, other, chain(3, 0.0))
    proxy.close()


def lease_left(fleet, job_id):
    with fleet.database.read() as session:
        query = select(Job.lease_expires_at, database_time()).where(Job.id == job_id)
        end, now = session.execute(query).one()
    assert end is not None, "the lease was taken away while its child was alive"
    return (end - now).total_seconds()
