"""A job's way through a supervisor, on SQLite, with a child that does what it is told."""

import json
import signal
import time
from pathlib import Path

import psutil
import pytest
from sqlalchemy import update

from service.contract.states import AttemptOutcome, JobState
from service.store.artifacts import list_artifacts
from service.store.checkpoints import list_checkpoints
from service.store.layers import layer_facts
from service.store.ranks import rank_history
from service.store.tables import Job


def test_there_is_nothing_to_run(house):
    assert house.run() is False


def test_a_job_succeeds_with_its_artifact_and_report(house):
    job_id = house.submit({}, dataset=b"data")
    assert house.run() is True
    job = house.job(job_id)
    assert (job.state, job.phase, job.problem) == (JobState.SUCCEEDED, "done", None)
    with house.database.read() as session:
        artifacts = list_artifacts(session, job_id)
    assert [(row.name, row.format) for row in artifacts] == [
        ("digits-compressed.pt", "torchscript"),
        ("report.json", "report"),
    ]
    assert b"".join(house.blobs.open_range(artifacts[0].blob_key)) == b'artifact of {"step": 2}'
    assert job.result["artifact_id"] == artifacts[0].id
    assert job.result["artifact_sha256"] == artifacts[0].sha256
    assert job.result["macs_fraction"] == 0.5
    assert [attempt.outcome for attempt in house.attempts(job_id)] == [AttemptOutcome.SUCCEEDED]
    assert [line["phase"] for line in house.events(job_id, "phase")] == ["learning", "emitting", "verifying", "storing"]
    assert not list(house.settings.scratch_dir.rglob("*/job_*"))


def test_what_the_child_says_lands_in_rows(house):
    learn = [["layers"], ["ranks", 0, 3, False], ["ranks", 1, 2, True], ["resolved", 7], ["events", 1200]]
    job_id = house.submit({"learn": [*learn, ["steps", 1, 0.0]]})
    house.run()
    job = house.job(job_id)
    assert job.state == JobState.SUCCEEDED
    assert job.spec["seed"] == 7
    assert job.progress["fraction"] == 1.0
    with house.database.read() as session:
        assert [facts.name for facts in layer_facts(session, job_id)] == ["fc"]
        assert [(row.step, row.rank, row.chosen) for row in rank_history(session, job_id)] == [
            (0, 3, False),
            (1, 2, True),
        ]
    lines = [line["message"] for line in house.events(job_id, "log")]
    assert lines == [f"line {number}" for number in range(1200)]


def test_the_assignment_holds_paths_and_hashes_but_no_secret(make_house, monkeypatch):
    monkeypatch.setenv("RANKPRESS_API_KEY", "a-secret-of-the-service")
    house = make_house()
    job_id = house.submit({"learn": [["environment"], ["steps", 1, 0.0]]}, dataset=b"data")
    house.run()
    (line,) = house.events(job_id, "log")
    assert "a-secret-of-the-service" not in json.dumps(line)
    assignment = line["assignment"]
    assert (assignment["device"], assignment["thread_count"], assignment["memory_bytes_max"]) == ("cpu", 1, 2**30)
    assert set(assignment["hashes"]) == {"model", "data", "spec"}
    assert assignment["data_format"] == "npz"
    assert Path(assignment["work_dir"]).is_relative_to(house.data_dir)


def test_a_permanent_failure_ends_the_job(house):
    job_id = house.submit({"learn": [["fail", "MODEL_RAISED", "forward raised ValueError", True]]})
    house.run()
    job = house.job(job_id)
    assert job.state == JobState.FAILED
    assert job.problem["code"] == "MODEL_RAISED"
    assert job.problem["detail"] == "forward raised ValueError"
    assert len(house.attempts(job_id)) == 1


def test_a_passing_failure_is_tried_again(house):
    learn = [["epoch", 1, "fail", "INTERNAL", "the disk was away", False], ["steps", 1, 0.0]]
    job_id = house.submit({"learn": learn})
    house.run()
    assert house.job(job_id).state == JobState.QUEUED
    house.run()
    assert house.job(job_id).state == JobState.SUCCEEDED
    assert [one.outcome for one in house.attempts(job_id)] == [AttemptOutcome.CRASHED, AttemptOutcome.SUCCEEDED]


@pytest.mark.parametrize(
    ("operation", "said"),
    [
        (["kill", signal.SIGSEGV], "SIGSEGV"),
        (["exit", 3], "exit code 3"),
        (["line", "no message"], "no message"),
        (["line", '{"type": "phase"}'], "no message"),
        (["phase", "x" * 41], "40 characters"),
        (["phase", "nul \x00"], "40 characters"),
        (["event", "state", {"state": "succeeded"}], "supervisor's"),
        (["event", "log", {"message": "x" * 70_000}], "65536 characters"),
    ],
)
def test_what_ends_an_attempt_as_a_crash(make_house, operation, said):
    house = make_house(max_attempts=1)
    job_id = house.submit({"learn": [["stderr", "the last word", 1], operation, ["sleep", 5]]})
    house.run()
    job = house.job(job_id)
    assert (job.state, job.problem["code"]) == (JobState.FAILED, "WORKER_LOST")
    assert said in job.problem["detail"]


def test_a_child_that_always_crashes_is_poison_and_others_flow(house):
    job_id = house.submit({"learn": [["kill", signal.SIGKILL]]})
    other = house.submit({})
    while house.run():
        pass
    job = house.job(job_id)
    assert (job.state, job.problem["code"], job.attempt) == (JobState.FAILED, "WORKER_LOST", 2)
    assert [one.outcome for one in house.attempts(job_id)] == [AttemptOutcome.CRASHED] * 2
    assert house.job(other).state == JobState.SUCCEEDED


def test_the_last_line_of_standard_error_is_told(house):
    job_id = house.submit({"learn": [["stderr", "RuntimeError: it broke here", 1], ["exit", 1]]})
    house.run()
    assert "RuntimeError: it broke here" in house.attempts(job_id)[0].detail


def test_a_retry_waits(make_house):
    house = make_house(retry_base_seconds=60.0)
    job_id = house.submit({"learn": [["exit", 1]]})
    assert house.run() is True
    assert house.run() is False
    assert house.job(job_id).state == JobState.QUEUED


def test_a_crash_resumes_from_the_checkpoint(house):
    learn = [["fresh", "checkpoint", 3], ["fresh", "exit", 1], ["steps", 5, 0.0]]
    job_id = house.submit({"learn": learn})
    house.run()
    assert house.job(job_id).attempt == 0  # progress: the count begins anew
    house.run()
    job = house.job(job_id)
    assert job.state == JobState.SUCCEEDED
    assert [line["step"] for line in house.events(job_id, "step")] == [4, 5]
    with house.database.read() as session:
        assert len(list_checkpoints(session, job_id, limit=None)) == 2


def test_progress_between_crashes_keeps_a_job_alive(house):
    crash_after = [
        ["epoch", epoch, operation, argument]
        for epoch in (1, 2, 3, 4)
        for operation, argument in (("checkpoint", epoch), ("exit", 1))
    ]
    job_id = house.submit({"learn": [*crash_after, ["steps", 6, 0.0]]})
    for _ in range(5):
        assert house.run() is True
    assert house.job(job_id).state == JobState.SUCCEEDED


def test_a_torn_checkpoint_is_passed_over(house):
    job_id = house.submit({"learn": [["fresh", "steps", 4, 0.0], ["fresh", "exit", 1], ["steps", 5, 0.0]]})
    house.run()
    with house.database.read() as session:
        newest = list_checkpoints(session, job_id)[0]
    house.blobs.local_path(newest.blob_key).write_text("torn")
    house.run()
    assert house.job(job_id).state == JobState.SUCCEEDED
    assert [line["step"] for line in house.events(job_id, "step")] == [1, 2, 3, 4, 5]  # step 4 is told once
    with house.database.read() as session:
        assert [(row.epoch, row.position) for row in list_checkpoints(session, job_id)] == [(2, 5), (2, 4)]


def test_dropped_checkpoints_leave_no_bytes(house):
    house.submit({"learn": [["steps", 6, 0.0]]})
    house.run()
    assert len(list((house.blobs.root / "checkpoints").rglob("*-*"))) == 2


def test_a_cancel_ends_the_child_within_the_grace(house):
    job_id = house.submit({"learn": [["phase", "learning"], ["sleep", 60]]})
    thread = house.run_aside()
    house.wait_for_phase(job_id, "learning")
    asked = time.monotonic()
    house.cancel(job_id)
    job = house.wait_for_state(job_id, JobState.CANCELED)
    assert time.monotonic() - asked < 1.0
    assert job.problem is None
    thread.join(2)
    assert [one.outcome for one in house.attempts(job_id)] == [AttemptOutcome.CANCELED]


def test_a_child_that_ignores_the_cancel_is_killed(house, tmp_path):
    pid_file = tmp_path / "pid"
    learn = [["ignore_term"], ["grandchild", str(tmp_path / "grandchild")], ["write_pid", str(pid_file)]]
    job_id = house.submit({"learn": [*learn, ["phase", "learning"], ["sleep", 60]]})
    house.run_aside()
    house.wait_for_phase(job_id, "learning")
    house.cancel(job_id)
    house.wait_for_state(job_id, JobState.CANCELED, seconds=4.0)
    for path in (pid_file, tmp_path / "grandchild"):
        house.wait(lambda path=path: not alive(int(path.read_text())), seconds=2.0)


@pytest.mark.parametrize("stage", ["emit", "verify"])
def test_a_cancel_works_in_every_stage(house, stage):
    job_id = house.submit({stage: [["sleep", 60]]})
    house.run_aside()
    house.wait_for_phase(job_id, {"emit": "emitting", "verify": "verifying"}[stage])
    house.cancel(job_id)
    house.wait_for_state(job_id, JobState.CANCELED)
    with house.database.read() as session:
        assert list_artifacts(session, job_id) == []


def test_a_lost_lease_kills_the_child_and_writes_nothing(house, tmp_path):
    pid_file = tmp_path / "pid"
    job_id = house.submit({"learn": [["write_pid", str(pid_file)], ["phase", "learning"], ["sleep", 60]]})
    thread = house.run_aside()
    house.wait_for_phase(job_id, "learning")
    with house.database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(lease_epoch=Job.lease_epoch + 1))
    before = house.events(job_id)
    thread.join(3)
    assert not thread.is_alive()
    assert not alive(int(pid_file.read_text()))
    assert house.events(job_id) == before
    assert house.job(job_id).state == JobState.RUNNING  # of the other attempt
    assert house.attempts(job_id)[0].outcome is None


def test_a_ghosts_checkpoint_and_artifact_do_not_count(house):
    job_id = house.submit({"learn": [["phase", "learning"], ["sleep", 0.5], ["steps", 3, 0.0]]})
    thread = house.run_aside()
    house.wait_for_phase(job_id, "learning")
    with house.database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(lease_epoch=Job.lease_epoch + 1))
    thread.join(5)
    with house.database.read() as session:
        assert list_checkpoints(session, job_id) == []
        assert list_artifacts(session, job_id) == []


def test_the_run_deadline(house):
    job_id = house.submit({"learn": [["phase", "learning"], ["sleep", 60]]}, run_seconds=0.6)
    house.run()
    job = house.job(job_id)
    assert (job.state, job.problem["code"]) == (JobState.FAILED, "TIMEOUT")
    assert "0.6 seconds" in job.problem["detail"]


def test_the_run_deadline_counts_earlier_attempts(house):
    learn = [["fresh", "checkpoint", 1], ["fresh", "sleep", 0.5], ["fresh", "exit", 1], ["sleep", 60]]
    job_id = house.submit({"learn": learn}, run_seconds=1.2)
    house.run()
    again = time.monotonic()
    house.run()
    assert time.monotonic() - again < 1.0
    assert house.job(job_id).problem["code"] == "TIMEOUT"


def test_the_first_forward_has_a_deadline_of_its_own(house):
    spec = {"deadlines": {"first_forward_seconds": 0.3}}
    job_id = house.submit({"learn": [["ignore_term"], ["phase", "inspecting"], ["sleep", 60]]}, spec=spec)
    house.run()
    job = house.job(job_id)
    assert (job.state, job.problem["code"]) == (JobState.FAILED, "TIMEOUT")
    assert "forward did not return in 0.3 seconds" in job.problem["detail"]


def test_a_forward_that_returned_is_no_longer_counted(house):
    spec = {"deadlines": {"first_forward_seconds": 0.3}}
    job_id = house.submit(
        {"learn": [["phase", "inspecting"], ["layers"], ["sleep", 0.7], ["steps", 1, 0.0]]}, spec=spec
    )
    house.run()
    assert house.job(job_id).state == JobState.SUCCEEDED


def test_memory_is_limited_on_a_cpu(house):
    job_id = house.submit({"learn": [["reserve", 2**32]]})
    house.run()
    assert house.job(job_id).problem["code"] == "OUT_OF_MEMORY"


def test_a_death_for_memory_is_read_from_standard_error(house):
    said = "terminate called after throwing an instance of 'std::bad_alloc'"
    job_id = house.submit({"learn": [["stderr", said, 1], ["kill", signal.SIGABRT]]})
    house.run()
    job = house.job(job_id)
    assert (job.state, job.problem["code"]) == (JobState.FAILED, "OUT_OF_MEMORY")
    assert str(2**30) in job.problem["detail"]


def test_the_resident_size_is_watched_on_a_gpu(make_house):
    house = make_house(child_memory_bytes=2**27)
    job_id = house.submit({"learn": [["allocate", 2**28], ["sleep", 60]]}, spec={"device": "cuda"})
    house.run()
    job = house.job(job_id)
    assert (job.state, job.problem["code"]) == (JobState.FAILED, "OUT_OF_MEMORY")
    assert str(2**27) in job.problem["detail"]


def test_a_drain_gives_the_job_back_uncounted(house):
    job_id = house.submit(
        {"learn": [["checkpoint_on_drain", 3], ["phase", "learning"], ["fresh", "sleep", 60], ["steps", 5, 0.0]]}
    )
    thread = house.run_aside()
    house.wait_for_phase(job_id, "learning")
    house.supervisor.drain(60.0)  # a child that heard it ends at once
    thread.join(60)
    job = house.job(job_id)
    assert (job.state, job.attempt) == (JobState.QUEUED, 0)
    assert [one.outcome for one in house.attempts(job_id)] == [AttemptOutcome.DRAINED]
    assert house.run() is False  # a drained supervisor claims nothing
    assert house.another_supervisor().run_next() is True
    assert house.job(job_id).state == JobState.SUCCEEDED
    assert [line["step"] for line in house.events(job_id, "step")] == [4, 5]


def test_a_drain_before_any_checkpoint_is_not_counted_either(house):
    job_id = house.submit({"learn": [["phase", "learning"], ["sleep", 60]]})
    thread = house.run_aside()
    house.wait_for_phase(job_id, "learning")
    house.supervisor.drain(1.0)
    thread.join(3)
    assert house.job(job_id).attempt == 0


def test_an_artifact_that_is_a_link_is_refused(house, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("a secret of the machine")
    job_id = house.submit({"emit": [["link_artifact", str(secret)]], "verify": [["done", {"summary": {}}]]})
    house.run()
    assert "regular file" in house.attempts(job_id)[0].detail
    assert not list((house.blobs.root / "sha256").rglob("*secret*"))


def test_another_artifact_than_the_verified_one_is_refused(house):
    job_id = house.submit({"verify": [["report"], ["done", {"artifact_sha256": "0" * 64}]]})
    house.run()
    assert house.job(job_id).problem["code"] == "VERIFICATION_FAILED"


def test_a_loss_that_is_no_number_is_shown_as_none(house):
    line = '{"type": "progress", "progress": {"step": 1, "fraction": 0.5, "loss": NaN, "eta_seconds": Infinity}}'
    job_id = house.submit({"learn": [["line", line], ["fail", "DIVERGED", "the loss is no number", True]]})
    house.run()
    job = house.job(job_id)
    assert job.problem["code"] == "DIVERGED"
    assert job.progress.get("loss") is None


def test_a_spamming_child_ends_well(house):
    job_id = house.submit({"learn": [["stderr", "x" * 1000, 5000], ["events", 5000], ["steps", 1, 0.0]]})
    house.run()
    assert house.job(job_id).state == JobState.SUCCEEDED
    assert len(house.events(job_id, "log")) == 5000


def test_a_command_that_cannot_start_is_a_crash(house):
    job_id = house.submit({})
    house.another_supervisor(["/does/not/exist"]).run_next()
    assert house.job(job_id).state == JobState.QUEUED
    assert "FileNotFoundError" in house.attempts(job_id)[0].detail


def alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
