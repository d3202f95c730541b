"""Jobs go on although a random process is killed every few seconds and the broker forgets and goes away."""

import contextlib
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import psutil
import pytest
from fleet import SCALED, Fleet
from scripts import chain

from service.contract.states import AttemptOutcome, JobState

# Kills may well hit one job over and over after its last checkpoint; poison has tests of its own.
MAX_ATTEMPTS = 100
KINDS = {"child": 5, "worker": 2, "machine": 1, "service": 1}  # how often which
SLOTS = 2


@dataclass
class Disturber:
    """Kills something of the fleet every now and then, and plays its tricks on the broker."""

    fleet: Fleet
    every_seconds: float
    random: random.Random
    kills: Counter = field(default_factory=Counter)
    next_at: float = 0.0
    broker_done: int = 0

    def disturb(self, fraction_ended: float) -> None:
        now = time.monotonic()
        if now >= self.next_at:
            self.next_at = now + self.random.uniform(0.6, 1.4) * self.every_seconds
            self.kill(self.random.choices(list(KINDS), list(KINDS.values()))[0])
        steps = [(0.25, self.flush), (0.5, self.restart), (0.75, self.flush)]
        if self.broker_done < len(steps) and fraction_ended >= steps[self.broker_done][0]:
            steps[self.broker_done][1]()
            self.broker_done += 1

    def kill(self, kind: str) -> None:
        if kind == "service":
            service = self.fleet.services[0]
            if service.alive():
                service.kill()
                self.kills[kind] += 1
            return
        machine = self.random.choice(self.fleet.machines)
        slot = self.random.randrange(SLOTS)  # when few jobs are left, none of them gets all the kills
        children = machine.children()
        if kind == "child" and slot < len(children):
            with contextlib.suppress(psutil.NoSuchProcess):
                children[slot].kill()
                self.kills[kind] += 1
        elif kind != "child" and machine.alive():
            (machine.kill_whole if kind == "machine" else machine.kill)()
            self.kills[kind] += 1

    def flush(self) -> None:
        self.fleet.flush_broker()
        self.kills["flush"] += 1

    def restart(self) -> None:
        self.fleet.restart_broker(pause_seconds=1.0)
        self.kills["broker"] += 1


@pytest.mark.parametrize(
    ("fakes", "reals", "step_seconds", "every_seconds"),
    [(15, 0, 0.2, 2.0), pytest.param(90, 10, 0.5, 4.0, marks=[pytest.mark.full, pytest.mark.timeout(1200)])],
    ids=["15", "100"],
)
def test_random_kills(make_fleet, request, fakes, reals, step_seconds, every_seconds):
    fleet = make_fleet(SCALED | {"SLOTS": str(SLOTS), "CHECKPOINT_SECONDS": "0.05", "CHECKPOINT_SPACING_SECONDS": "0"})
    fleet.add_service()
    fleet.add_machine()
    fleet.add_machine()
    fleet.wait_for_workers(2)
    lengths = (6, 7, 8)
    scripts = [chain(length, step_seconds) for length in lengths]
    undisturbed = [fleet.submit(chain(length, 0.0)) for length in lengths]
    fleet.wait_for_end(undisturbed, 120)
    fleet.check(undisturbed)

    real_job = request.getfixturevalue("real_job") if reals else None
    mixed = [scripts[index % 3] for index in range(fakes)] + [real_job] * reals
    kinds = [index % 3 for index in range(fakes)] + [3] * reals
    order = list(range(fakes + reals))
    disturber = Disturber(fleet, every_seconds, random.Random(7))
    disturber.random.shuffle(order)
    job_ids = {index: fleet.submit(mixed[index], max_attempts=MAX_ATTEMPTS) for index in order}
    started = time.monotonic()
    run_disturbed(fleet, disturber, list(job_ids.values()), seconds=60 + 8 * fakes + 30 * reals)
    lasted = time.monotonic() - started

    fleet.check(list(job_ids.values()))
    wanted = [fleet.artifact(job_id) for job_id in undisturbed]
    wanted += [request.getfixturevalue("undisturbed_artifact")] if reals else []
    for index, job_id in job_ids.items():
        assert fleet.artifact(job_id) == wanted[kinds[index]], fleet.diagnosis([job_id])
        if kinds[index] < 3:
            positions = {note["step"] for note in fleet.notes(job_id) if note["what"] == "step"}
            assert positions == set(range(1, lengths[kinds[index]] + 1))
    assert disturber.kills["flush"] == 2
    assert disturber.kills["broker"] == 1
    outcomes = Counter(one.outcome for job_id in job_ids.values() for one in fleet.attempts(job_id))
    assert outcomes[AttemptOutcome.SUCCEEDED] == len(job_ids)
    print(
        f"{len(job_ids)} jobs in {lasted:.0f} s; kills {dict(disturber.kills)}; attempts {dict(outcomes)}; "
        f"a child outlived its worker by at most {fleet.orphan_seconds:.2f} s"
    )


def run_disturbed(fleet: Fleet, disturber: Disturber, job_ids: list[str], seconds: float) -> None:
    until = time.monotonic() + seconds
    while True:
        ended = sum(JobState(fleet.job(job_id).state).terminal for job_id in job_ids)
        if ended == len(job_ids):
            return
        assert time.monotonic() < until, f"{ended} of {len(job_ids)} ended; {disturber.kills}\n{fleet.diagnosis()}"
        disturber.disturb(ended / len(job_ids))
        fleet.tend()
        time.sleep(0.05)
