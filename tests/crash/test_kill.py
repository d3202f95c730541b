"""Real processes are killed: nothing they started lives on, and no accepted job is lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from house import build, make_template

from service.contract.states import AttemptOutcome, JobState
from service.store.artifacts import list_artifacts

HOST = Path(__file__).with_name("host.py")


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return make_template(tmp_path_factory.mktemp("template"))


@pytest.fixture
def house(template, tmp_path):
    house = build(template, tmp_path / "data")
    yield house
    house.close()


@pytest.fixture
def start_host(house):
    hosts = []

    def starter():
        process = subprocess.Popen(
            [sys.executable, str(HOST), str(house.data_dir)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        hosts.append(process)
        for line in process.stdout:
            if line == b"ready\n":
                return process
        raise AssertionError("the host did not start")

    yield starter
    for process in hosts:
        process.kill()
        process.wait()
        process.stdout.close()


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def all_stopped(pid):
    """Whether each thread has stopped: one that is inside of a call stops after it, and may have taken a lock there."""
    states = [
        (thread / "stat").read_text().rpartition(")")[2].split()[0] for thread in Path(f"/proc/{pid}/task").iterdir()
    ]
    return set(states) == {"T"}


def running_child(house, job_id, tmp_path):
    house.wait_for_phase(job_id, "learning")
    return int((tmp_path / "pid").read_text())


def test_kill_9_of_the_service_leaves_no_child_and_the_job_finishes(house, start_host, tmp_path):
    learn = [["write_pid", str(tmp_path / "pid")], ["phase", "learning"], ["steps", 8, 0.15]]
    job_id = house.submit({"learn": learn})
    host = start_host()
    child = running_child(house, job_id, tmp_path)
    house.wait(lambda: len(house.events(job_id, "step")) >= 3)
    host.kill()
    host.wait()
    house.wait(lambda: gone(child), seconds=2.0)
    done = max(line["step"] for line in house.events(job_id, "step"))
    start_host()
    house.wait_for_state(job_id, JobState.SUCCEEDED)
    steps = [line["step"] for line in house.events(job_id, "step")]
    assert steps[-1] == 8
    assert len(steps) <= 8 + 1  # it went on from its checkpoint: at most the step in flight was repeated
    assert done >= 3
    outcomes = [one.outcome for one in house.attempts(job_id)]
    assert outcomes == [AttemptOutcome.LOST, AttemptOutcome.SUCCEEDED]
    with house.database.read() as session:
        artifact = list_artifacts(session, job_id)[0]
    undisturbed = house.submit({"learn": [["steps", 8, 0.0]]})
    house.run()
    with house.database.read() as session:
        assert list_artifacts(session, undisturbed)[0].sha256 == artifact.sha256


@pytest.mark.parametrize("stage", ["emit", "verify"])
def test_kill_9_in_a_later_stage(house, start_host, tmp_path, stage):
    script = {stage: [["write_pid", str(tmp_path / "pid")], ["epoch", 1, "sleep", 60], [stage]]}
    job_id = house.submit(script)
    host = start_host()
    house.wait(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    child = int((tmp_path / "pid").read_text())
    host.kill()
    host.wait()
    house.wait(lambda: gone(child), seconds=2.0)
    start_host()
    house.wait_for_state(job_id, JobState.SUCCEEDED)


def test_a_job_that_kills_the_service_each_time_is_poison(house, start_host, tmp_path):
    job_id = house.submit({"learn": [["write_pid", str(tmp_path / "pid")], ["phase", "learning"], ["sleep", 60]]})
    for _ in range(house.settings.max_attempts):
        host = start_host()
        house.wait_for_state(job_id, JobState.RUNNING)
        host.kill()
        host.wait()
    start_host()
    job = house.wait_for_state(job_id, JobState.FAILED)
    assert job.problem["code"] == "WORKER_LOST"
    assert len(house.attempts(job_id)) == house.settings.max_attempts


def test_kill_9_of_the_child_alone(house, start_host, tmp_path):
    learn = [["write_pid", str(tmp_path / "pid")], ["fresh", "checkpoint", 2], ["phase", "learning"]]
    job_id = house.submit({"learn": [*learn, ["epoch", 1, "sleep", 60], ["steps", 4, 0.0]]})
    start_host()
    os.kill(running_child(house, job_id, tmp_path), signal.SIGKILL)
    house.wait_for_state(job_id, JobState.SUCCEEDED)
    assert [one.outcome for one in house.attempts(job_id)] == [AttemptOutcome.CRASHED, AttemptOutcome.SUCCEEDED]
    assert "SIGKILL" in house.attempts(job_id)[0].detail


def test_a_stopped_service_is_overtaken_and_its_ghost_writes_nothing(house, start_host, tmp_path):
    learn = [["write_pid", str(tmp_path / "pid")], ["phase", "learning"], ["epoch", 1, "sleep", 60], ["steps", 2, 0.0]]
    job_id = house.submit({"learn": learn})
    host = start_host()
    child = running_child(house, job_id, tmp_path)
    # Under the test's own write lock: a process that is stopped inside a transaction would keep SQLite's one lock.
    with house.database.write() as session:
        session.connection()  # a session takes the lock with its first statement only
        host.send_signal(signal.SIGSTOP)
        house.wait(lambda: all_stopped(host.pid), seconds=3.0)
    os.kill(child, signal.SIGSTOP)
    time.sleep(house.settings.reap_seconds + 0.2)
    from service.reconcile import Reconciler

    Reconciler(house.database, house.bell, house.settings, house.blobs).expired_leases()
    assert house.job(job_id).state == JobState.QUEUED
    assert house.run() is True
    before = (house.job(job_id).state, len(house.events(job_id)))
    assert before[0] == JobState.SUCCEEDED
    os.kill(child, signal.SIGCONT)
    host.send_signal(signal.SIGCONT)
    house.wait(lambda: gone(child), seconds=3.0)
    time.sleep(0.5)
    assert (house.job(job_id).state, len(house.events(job_id))) == before
    with house.database.read() as session:
        assert len(list_artifacts(session, job_id)) == 2


def test_an_ordered_stop_gives_the_job_back(house, start_host, tmp_path):
    learn = [["write_pid", str(tmp_path / "pid")], ["phase", "learning"], ["epoch", 1, "sleep", 60], ["steps", 2, 0.0]]
    job_id = house.submit({"learn": learn})
    host = start_host()
    child = running_child(house, job_id, tmp_path)
    asked = time.monotonic()
    host.terminate()
    assert host.wait(10) == 0
    assert time.monotonic() - asked < 8.0
    assert gone(child)
    assert house.job(job_id).state == JobState.QUEUED
    start_host()
    house.wait_for_state(job_id, JobState.SUCCEEDED)
