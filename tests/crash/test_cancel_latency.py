"""A cancel ends a job within seconds, whatever it is doing; measured with the timings of production."""

import statistics
import time

import pytest
from fleet import Fleet, RealJob
from scripts import chain

from service.contract.states import JobState
from service.store.jobs import request_cancel

P95_SECONDS = 5.0
LONG = 600
# What the child of a job does so that the job stays where it is to be canceled.
HELD = {
    "starting": {"learn": [["sleep", LONG]]},
    "inspecting": {"learn": [["phase", "inspecting"], ["sleep", LONG]]},
    "learning": {"learn": [["phase", "learning"], ["chain", LONG, 0.5]]},
    "deaf to SIGTERM": {"learn": [["ignore_term"], ["phase", "learning"], ["sleep", LONG]]},
    "fine_tuning": {"learn": [["phase", "fine_tuning"], ["sleep", LONG]]},
    "emitting": chain(1, 0.0, emit=[["sleep", LONG]]),
    "verifying": chain(1, 0.0, verify=[["sleep", LONG]]),
}
WAITING = ("waiting", "backoff")


class Stopwatch:
    """Cancels many jobs at once and takes each one's time by itself."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.asked: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    def cancel(self, job_id: str) -> None:
        self.asked[job_id] = time.monotonic()
        with self.fleet.database.write() as session:
            request_cancel(session, job_id, None)

    def wait(self) -> None:
        def all_ended() -> bool:
            for job_id in self.asked.keys() - self.seconds.keys():
                row = self.fleet.job(job_id)
                if JobState(row.state).terminal:
                    self.seconds[job_id] = time.monotonic() - self.asked[job_id]
                    assert row.state == JobState.CANCELED, self.fleet.diagnosis([job_id])
            return len(self.seconds) == len(self.asked)

        self.fleet.wait(all_ended, 30, "every canceled job ends")


@pytest.mark.parametrize(
    "rounds", [1, pytest.param(12, marks=[pytest.mark.full, pytest.mark.timeout(900)])], ids=["short", "full"]
)
def test_cancel_over_states_and_phases(make_fleet, rounds):
    fleet = make_fleet({"SLOTS": str(len(HELD)), "RECONCILE_SECONDS": "1"})
    fleet.add_service()
    machine = fleet.add_machine()
    fleet.wait_for_workers(1)
    watch = Stopwatch(fleet)
    kinds: dict[str, str] = {}
    for number in range(rounds):
        held = {fleet.submit(script): kind for kind, script in HELD.items()}
        fleet.wait(lambda held=held: all_there(fleet, held), 60, f"every job is where it is to be: {held}")
        waiting = fleet.submit(chain(), ring=False)
        assert fleet.job(waiting).state == JobState.QUEUED
        time.sleep(number * 0.37 % 2)  # heartbeats come every 2 s: not always at the same place between two
        for job_id in (waiting, *held):
            watch.cancel(job_id)
        kinds |= held | {waiting: "waiting"}
        watch.wait()
        assert not machine.children()
    # A job in backoff: its child dies, and it waits for its second try.
    for _ in range(max(1, rounds // 4)):
        job_id = fleet.submit({"learn": [["exit", 9]]})
        fleet.wait(lambda job_id=job_id: in_backoff(fleet, job_id), 30, "the job is in backoff")
        watch.cancel(job_id)
        kinds[job_id] = "backoff"
        watch.wait()
    report(watch, kinds)


def test_cancel_while_files_are_stored(make_fleet, s3_server, s3_url):
    """The store of files hangs at that moment; nobody waits for it."""
    fleet = make_fleet({}, blob_url=s3_url, environment=s3_server.environment)
    fleet.add_service()
    fleet.add_machine()
    script = chain(1, 0.0, verify=[["wait_for", str(fleet.folder / "go")], ["verify"]])
    job_id = fleet.submit(script)
    fleet.wait_for_phase(job_id, "verifying")
    watch = Stopwatch(fleet)
    with s3_server.away():
        (fleet.folder / "go").touch()
        fleet.wait_for_phase(job_id, "storing")
        watch.cancel(job_id)
        watch.wait()
    print(f"storing: {watch.seconds[job_id]:.2f} s")
    assert watch.seconds[job_id] <= P95_SECONDS
    after = fleet.submit(chain(1, 0.0))
    fleet.wait_for_end([after], 60)
    fleet.check([after])


@pytest.mark.full
@pytest.mark.timeout(900)
def test_cancel_over_the_phases_of_the_real_engine(make_fleet, real_job):
    """Learning and fine-tuning are made endless; the shorter phases are met as they pass, or missed."""
    fleet = make_fleet({})
    fleet.add_service()
    machine = fleet.add_machine()
    watch = Stopwatch(fleet)
    kinds: dict[str, str] = {}
    missed = 0
    one_step = {"method": {"mu": {"steps": 1}}, "fine_tune": {"epochs": 10_000}}
    specs = {
        "starting": {},
        "inspecting": {},
        "learning": {"training": real_job.spec["training"] | {"epochs_per_step": 10_000}},
        "fine_tuning": one_step,
        "emitting": {},
        "verifying": {},
    }
    for phase in [*specs] * 4:
        job_id = fleet.submit(RealJob(real_job.model, real_job.dataset, real_job.spec | specs[phase]))
        order = list(specs)
        until = {*order[order.index(phase) + 1 :], "storing", "done"}
        wanted = {phase, *until}
        seen = fleet.wait(lambda job_id=job_id, wanted=wanted: wanted & {fleet.job(job_id).phase}, 30, phase)
        watch.cancel(job_id)
        row = fleet.wait(lambda job_id=job_id: ended(fleet, job_id), 30, "the job ends")
        if seen != {phase} or row.state == JobState.SUCCEEDED:
            missed += 1
            del watch.asked[job_id]
        else:
            kinds[job_id] = phase
            watch.wait()
        assert not machine.children()
    print(f"{missed} phases were over before they were seen, or the job before the cancel was")
    assert set(kinds.values()) >= {"starting", "learning", "fine_tuning"}
    report(watch, kinds)


def ended(fleet, job_id):
    row = fleet.job(job_id)
    return row if JobState(row.state).terminal else None


def all_there(fleet, held):
    phases = {job_id: fleet.job(job_id).phase for job_id in held}
    wanted = {job_id: "learning" if kind == "deaf to SIGTERM" else kind for job_id, kind in held.items()}
    return phases == wanted and all(fleet.notes(job_id) for job_id in held)


def in_backoff(fleet, job_id):
    row = fleet.job(job_id)
    return row.state == JobState.QUEUED and row.lease_epoch == 1


def report(watch, kinds):
    deaf = [watch.seconds[job_id] for job_id, kind in kinds.items() if kind == "deaf to SIGTERM"]
    rest = sorted(watch.seconds[job_id] for job_id, kind in kinds.items() if kind != "deaf to SIGTERM")
    for kind in dict.fromkeys(kinds.values()):
        of_kind = sorted(watch.seconds[job_id] for job_id in kinds if kinds[job_id] == kind)
        print(f"{kind}: {len(of_kind)} canceled, {statistics.median(of_kind):.2f} s, at most {of_kind[-1]:.2f} s")
    p95 = rest[int(0.95 * (len(rest) - 1) + 0.5)]
    print(f"all {len(rest)}: p50 {statistics.median(rest):.2f} s, p95 {p95:.2f} s, at most {rest[-1]:.2f} s")
    assert p95 <= P95_SECONDS
    grace = watch.fleet.settings.cancel_grace_seconds
    assert max(deaf, default=0.0) <= watch.fleet.settings.heartbeat_seconds + grace + 2
