"""A blob store that is away, or has no room, costs a job time and never its tries."""

import errno

import pytest

from service.blobs.errors import BlobStoreAwayError, storage_full
from service.contract.states import AttemptOutcome, JobState


def failing(method, error, only):
    def call(*arguments, **named):
        if only(*arguments):
            raise error
        return method(*arguments, **named)

    return call


@pytest.fixture
def away(house, monkeypatch):
    def make(method, error, only=lambda *_: True):
        monkeypatch.setattr(house.blobs, method, failing(getattr(house.blobs, method), error, only))

    return make


@pytest.mark.parametrize("error", [BlobStoreAwayError("no answer"), storage_full()])
def test_a_run_goes_on_without_a_checkpoint(house, away, error):
    away("put_file", error, lambda _path, key, **_: key.startswith("checkpoints/"))
    job_id = house.submit({"learn": [["steps", 3, 0.0]]})
    house.run()
    assert house.job(job_id).state == JobState.SUCCEEDED
    warnings = house.events(job_id, "warning")
    assert {line["code"] for line in warnings} == {"CHECKPOINT_NOT_STORED"}


@pytest.mark.parametrize("error", [BlobStoreAwayError("no answer"), storage_full()])
def test_results_that_cannot_be_stored_wait_uncounted(house, away, error, monkeypatch):
    job_id = house.submit({"learn": [["steps", 2, 0.0]]})
    with monkeypatch.context() as broken:
        broken.setattr(house.blobs, "put_content", failing(house.blobs.put_content, error, lambda *_: True))
        for _ in range(4):  # twice as often as the job may be tried
            assert house.run()
    job = house.job(job_id)
    assert (job.state, job.attempt) == (JobState.QUEUED, 0)
    assert house.attempts(job_id)[-1].outcome == AttemptOutcome.DEFERRED
    house.run()
    assert house.job(job_id).state == JobState.SUCCEEDED


def test_a_checkpoint_that_cannot_be_read_now_is_waited_for(house, monkeypatch):
    learn = [["fresh", "steps", 2, 0.0], ["fresh", "exit", 1], ["steps", 3, 0.0]]
    job_id = house.submit({"learn": learn})
    house.run()
    with monkeypatch.context() as broken:
        error = BlobStoreAwayError("no answer")
        only = lambda key, *_: key.startswith("checkpoints/")  # noqa: E731
        broken.setattr(house.blobs, "size", failing(house.blobs.size, error, only))
        assert house.run()
    assert "blob store is away" in house.attempts(job_id)[-1].detail
    house.run()
    assert house.job(job_id).state == JobState.SUCCEEDED
    assert [line["step"] for line in house.events(job_id, "step")] == [1, 2, 3]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_is_waited_for(house, monkeypatch, number):
    learn = [["fresh", "steps", 2, 0.0], ["fresh", "exit", 1], ["steps", 3, 0.0]]
    job_id = house.submit({"learn": learn})
    house.run()
    with monkeypatch.context() as broken:
        only = lambda key, *_: key.startswith("checkpoints/")  # noqa: E731
        broken.setattr(house.blobs, "size", failing(house.blobs.size, OSError(number, "the disk"), only))
        for _ in range(3):
            assert house.run()
    job = house.job(job_id)
    assert (job.state, house.attempts(job_id)[-1].outcome) == (JobState.QUEUED, AttemptOutcome.DEFERRED)
    house.run()
    assert [line["step"] for line in house.events(job_id, "step")] == [1, 2, 3]  # from its checkpoint


def test_a_child_without_room_is_waited_for(house):
    job_id = house.submit({"learn": [["epoch", 1, "fail", "STORAGE_FULL", "no room", False], ["steps", 1, 0.0]]})
    house.run()
    assert (house.job(job_id).state, house.job(job_id).attempt) == (JobState.QUEUED, 0)
    house.run()
    assert house.job(job_id).state == JobState.SUCCEEDED


def test_files_that_a_sweep_took_are_stored_anew(house, monkeypatch):
    job_id = house.submit({})
    with monkeypatch.context() as swept:
        swept.setattr(house.blobs, "exists", lambda key: False)
        assert house.run()
    assert house.attempts(job_id)[0].outcome == AttemptOutcome.DEFERRED
    house.run()
    assert house.job(job_id).state == JobState.SUCCEEDED


def test_a_model_that_is_gone_fails_the_job_with_words(house):
    job_id = house.submit({})
    for path in (house.blobs.root / "sha256").rglob("*"):
        if path.is_file():
            path.unlink()
    house.run()
    job = house.job(job_id)
    assert (job.state, job.problem["code"]) == (JobState.FAILED, "INTERNAL")
    assert "upload it again" in job.problem["detail"]
