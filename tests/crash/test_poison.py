"""Jobs that kill what runs them: without progress they end after `max_attempts`, with progress they never do."""

import pytest
from scripts import POISON, POISON_FOR_WORKERS, chain, dying_chain

from service.contract.states import AttemptOutcome, JobState

MAX_ATTEMPTS = 3


def test_poison_fails_after_exactly_max_attempts_and_other_jobs_flow(make_fleet):
    fleet = make_fleet()
    fleet.add_service()
    fleet.add_machine()
    fleet.add_machine()
    fleet.wait_for_workers(2)
    poison = fleet.submit(POISON, max_attempts=MAX_ATTEMPTS)
    others = [fleet.submit(chain(5, 0.05)) for _ in range(4)]
    fleet.wait_for_end([poison, *others], 60)
    fleet.check(others)
    check_poison(fleet, poison, AttemptOutcome.CRASHED)
    started, ended = fleet.job(poison).started_at, fleet.job(poison).finished_at
    between = [other for other in others if started < fleet.job(other).finished_at < ended]
    assert between, "no other job ended while the poison was tried"

    # One that kills its supervisor instead takes a worker with it each time, and the lease has to run out.
    poison = fleet.submit(POISON_FOR_WORKERS, max_attempts=MAX_ATTEMPTS)
    fleet.wait_for_epoch(poison, 1)
    others = [fleet.submit(chain(5, 0.05)) for _ in range(4)]
    fleet.wait_for_end([poison, *others], 90)
    fleet.check(others)
    check_poison(fleet, poison, AttemptOutcome.LOST)
    assert sum(len(machine.deaths) for machine in fleet.machines) == MAX_ATTEMPTS


def check_poison(fleet, job_id, outcome):
    row = fleet.job(job_id)
    assert (row.state, row.problem["code"]) == (JobState.FAILED, "WORKER_LOST"), fleet.diagnosis([job_id])
    assert [one.outcome for one in fleet.attempts(job_id)] == [outcome] * MAX_ATTEMPTS
    assert str(MAX_ATTEMPTS) in row.problem["detail"]
    fleet.check_children(job_id)


@pytest.mark.parametrize("steps", [6, pytest.param(40, marks=pytest.mark.full)])
def test_kills_that_let_a_job_progress_never_exhaust_it(make_fleet, steps):
    fleet = make_fleet()
    fleet.add_service()
    fleet.add_machine()
    job_id = fleet.submit(dying_chain(steps, 1), max_attempts=1)
    undisturbed = fleet.submit(chain(steps, 0.0))
    fleet.wait_for_end([job_id, undisturbed], 60 + 3 * steps)
    fleet.check([job_id, undisturbed])
    assert len(fleet.attempts(job_id)) == steps
    assert fleet.artifact(job_id) == fleet.artifact(undisturbed)
