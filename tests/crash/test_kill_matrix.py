"""The real engine is killed at every named point, each process in turn, and the artifact is the undisturbed one."""

import itertools
import time

import httpx2
import pytest
from fleet import SCALED, Fleet
from processes import KEY

from service.contract.states import JobState

CHILD = {"runner": "kill_self", "supervisor": "kill_parent", "worker": "kill_both"}
SUPERVISOR = {"runner": "kill_children", "supervisor": "kill_self", "worker": "kill_all"}
WITHOUT_CHILD = {"supervisor": "kill_self"}  # no runner lives there, and so the worker is its supervisor
# The point, at which passing of it, who can be killed there, and whether a checkpoint must have been stored before
# (the supervisor may be some checkpoints behind its child: hence the later passings).
MATRIX = [
    ("after_claim", 1, WITHOUT_CHILD, False),
    ("child_started", 1, SUPERVISOR, False),
    ("child_started", 2, SUPERVISOR, True),  # the emission
    ("child_started", 3, SUPERVISOR, True),  # the verification
    ("mid_l_step", 1, CHILD, False),
    ("mid_l_step", 120, CHILD, True),
    ("mid_c_step", 12, CHILD, True),
    ("checkpoint_written", 1, CHILD, False),
    ("checkpoint_written", 12, CHILD, True),
    ("checkpoint_renamed", 1, CHILD, False),
    ("checkpoint_renamed", 12, CHILD, True),
    ("checkpoint_row", 1, SUPERVISOR, True),
    ("checkpoint_row", 12, SUPERVISOR, True),
    ("artifact_put", 1, WITHOUT_CHILD, True),
    ("before_finish", 1, WITHOUT_CHILD, True),
]
# And the kill of a whole worker in an L step, in test_two_machines.py; going on from inside of a C step, in
# engine/test_resume.py.
SHORT = {
    ("checkpoint_renamed", 12, "supervisor"),
    ("checkpoint_row", 12, "runner"),
    ("before_finish", 1, "supervisor"),
}
CELLS = [
    pytest.param(
        f"{point}={action}@{passing}",
        resumes,
        marks=[] if (point, passing, victim) in SHORT else pytest.mark.full,
        id=f"{point}-{passing}-{victim}",
    )
    for point, passing, actions, resumes in MATRIX
    for victim, action in actions.items()
]
OFTEN = {"CHECKPOINT_SECONDS": "0.05", "CHECKPOINT_SPACING_SECONDS": "0"}


class Yard:
    """A service on which cell after cell has a machine of its own."""

    def __init__(self, folder, postgres_url, real_job, wanted, settings):
        self.fleet = Fleet(folder, postgres_url, settings | OFTEN)
        self.fleet.add_service()
        self.folder = folder
        self.numbers = itertools.count()
        self.real_job = real_job
        self.wanted = wanted

    def run(self, mark, *, once=True, seconds=120, **options):
        """One job on one machine with this mark."""
        number = next(self.numbers)
        once_file = self.folder / f"once-{number}"
        more = {"MARK": mark} | ({"MARK_ONCE": str(once_file)} if once else {})
        machine = self.fleet.add_machine(**more)
        try:
            job_id = self.fleet.submit(self.real_job, **options)
            began = time.monotonic()
            self.fleet.wait_for_end([job_id], seconds)
            self.fleet.check([job_id])
            attempts = self.fleet.attempts(job_id)
            print(f"{mark}: {len(attempts)} attempts, {time.monotonic() - began:.1f} s")
            assert not once or once_file.exists(), f"the point was never passed\n{self.fleet.diagnosis([job_id])}"
            assert self.fleet.artifact(job_id) == self.wanted
        finally:
            self.fleet.remove(machine)
        return job_id

    def resumed(self, job_id):
        """For each attempt, whether its first child went on from a checkpoint."""
        first = {note["epoch"]: note for note in reversed(self.fleet.notes(job_id)) if note["what"] == "start"}
        return [note["resumes"] for _, note in sorted(first.items()) if note["stage"] == "learn"]


@pytest.fixture(scope="module")
def yard(tmp_path_factory, postgres_url, real_job, undisturbed_artifact):
    yard = Yard(tmp_path_factory.mktemp("yard") / "fleet", postgres_url, real_job, undisturbed_artifact, SCALED)
    yield yard
    yard.fleet.close()


@pytest.mark.parametrize(("mark", "resumes"), CELLS)
def test_a_kill_at_a_named_point(yard, mark, resumes):
    job_id = yard.run(mark)
    assert len(yard.fleet.attempts(job_id)) == 2
    if resumes:
        assert yard.resumed(job_id)[-1] is True


@pytest.mark.full
def test_kills_again_and_again(yard):
    """Every attempt is killed in the 40th update of an L step, and each gets a bit further."""
    job_id = yard.run("mid_l_step=kill_self@40", once=False, seconds=240, max_attempts=2)
    assert len(yard.fleet.attempts(job_id)) >= 3


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_kill_of_the_worker_at_production_timings(tmp_path, postgres_url, real_job, undisturbed_artifact):
    yard = Yard(tmp_path / "fleet", postgres_url, real_job, undisturbed_artifact, {})
    try:
        job_id = yard.run("mid_l_step=kill_both@120", seconds=300)
        before, after = yard.fleet.attempts(job_id)
        assert before.ended_at is not None
        settings = yard.fleet.settings
        waited = (after.started_at - before.started_at).total_seconds()
        print(f"taken up {waited:.1f} s after the start of the first attempt")
        assert waited >= settings.reap_seconds
        assert (after.started_at - before.ended_at).total_seconds() < settings.retry_base_seconds + 15
    finally:
        yard.fleet.close()


def test_the_service_is_killed_after_the_commit(yard):
    """The client sees a broken connection; asking again with its key finds the job, which runs once."""
    once = yard.folder / "once-commit"
    marked = yard.fleet.add_service(MARK="after_commit=kill_self", MARK_ONCE=str(once))
    machine = yard.fleet.add_machine()
    try:
        with httpx2.Client(base_url=marked.wait_until_it_listens()) as client, pytest.raises(httpx2.TransportError):
            submit(client, yard.real_job)
        yard.fleet.wait(lambda: marked.starts == 2, 30, "the service is killed and started again")
        with httpx2.Client(base_url=marked.wait_until_it_listens()) as client:
            job_id = submit(client, yard.real_job)
            yard.fleet.wait_for_end([job_id], 120)
            listed = client.get("/v1/jobs", headers=headers()).json()["items"]
        yard.fleet.check([job_id])
        assert yard.fleet.artifact(job_id) == yard.wanted
        assert [job["id"] for job in listed if job["name"] == "committed"] == [job_id]
        assert once.exists()
    finally:
        yard.fleet.remove(machine)
        marked.kill_whole()
        yard.fleet.services.remove(marked)


def headers():
    return {"Authorization": f"Bearer {KEY}"}


def submit(client, real_job):
    import json

    answer = client.post(
        "/v1/jobs",
        headers=headers() | {"Idempotency-Key": "one-of-a-kind"},
        data={"spec": json.dumps(real_job.spec), "name": "committed"},
        files={"model": real_job.model.read_bytes(), "data": real_job.dataset.read_bytes()},
        timeout=30,
    )
    assert answer.status_code == 202, answer.text
    assert JobState(answer.json()["state"])
    return answer.json()["id"]
