import time

import pytest
from sqlalchemy import select, update
from submissions import QUEUE, claim_job

from service.contract.errors import ErrorCode, ProblemError
from service.contract.events import EventKind, Progress
from service.contract.plan import Form, LayerFacts, RankRow
from service.contract.resources import ResultSummary
from service.contract.states import AttemptOutcome, JobState
from service.store.artifacts import get_artifact, insert_artifact, list_artifacts
from service.store.attempts import (
    backoff_seconds,
    count_claimable,
    finish_canceled,
    finish_failed,
    finish_succeeded,
    heartbeat,
    requeue,
    set_resolved_spec,
)
from service.store.checkpoints import drop_finished_checkpoints, insert_checkpoint, latest_checkpoint, list_checkpoints
from service.store.events import append_events, list_events
from service.store.jobs import get_job, request_cancel
from service.store.layers import insert_layers
from service.store.leases import cancel_flagged, close_lost_attempts, expire_leases, release_all_leases
from service.store.ranks import insert_rank_rows
from service.store.tables import Attempt, Job

RESULT = ResultSummary(params_fraction=0.4, macs_fraction=0.3, file_bytes_fraction=0.5)
PROBLEM = ProblemError(ErrorCode.DIVERGED, "diverged").problem()


def read(database, job_id):
    with database.read() as session:
        return get_job(session, job_id, None)


def outcomes(database, job_id):
    with database.read() as session:
        query = select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.epoch)
        return [row.outcome for row in session.scalars(query)]


def expire(database, grace_seconds=0.0):
    with database.write() as session:
        return expire_leases(session, grace_seconds=grace_seconds, retry_base_seconds=0, retry_cap_seconds=0)


def checkpoint(database, claimed, step):
    with database.write() as session:
        return insert_checkpoint(
            session, claimed.job_id, claimed.epoch, position=step, blob_key=f"c{step}", sha256="0" * 64, bytes=1
        )


def crash(database, claimed, **values):
    arguments = {"outcome": AttemptOutcome.CRASHED, "delay_seconds": 0, "counted": True} | values
    with database.write() as session:
        return requeue(session, claimed.job_id, claimed.epoch, **arguments)


def test_a_claim_carries_all_that_an_attempt_needs(database, submit, take):
    job_id = submit()
    claimed = take()
    assert (claimed.job_id, claimed.epoch, claimed.attempt) == (job_id, 1, 1)
    assert claimed.model.bytes == len("a model")
    assert claimed.dataset is None
    assert claimed.checkpoints == []
    assert claim_job(database) is None
    row = read(database, job_id)
    assert (row.state, row.phase, row.lease_owner) == ("running", "starting", "worker")
    assert outcomes(database, job_id) == [None]


def test_claims_go_by_priority_then_age(database, submit, take):
    first, second, urgent = submit(), submit(), submit(priority=-5)
    assert [take().job_id for _ in range(3)] == [urgent, first, second]


def test_a_job_that_must_wait_or_is_flagged_or_elsewhere_is_not_claimed(database, submit):
    waits, flagged, _ = submit(), submit(), submit(queue="another")
    with database.write() as session:
        from service.store.time import database_time

        session.execute(update(Job).where(Job.id == waits).values(not_before=database_time(60)))
        session.execute(update(Job).where(Job.id == flagged).values(cancel_requested_at=database_time()))
    assert claim_job(database) is None
    with database.write() as session:
        assert count_claimable(session, QUEUE) == 0
        assert cancel_flagged(session) == [flagged]
    assert read(database, flagged).state == "canceled"


def test_a_heartbeat_prolongs_the_lease_and_returns_the_flag(database, submit, take):
    job_id = submit()
    claimed = take(lease_seconds=1)
    before = read(database, job_id).lease_expires_at
    progress = Progress(step=2, total_steps=4, fraction=0.5)
    with database.write() as session:
        beat = heartbeat(session, job_id, 1, lease_seconds=30, phase="learning", progress=progress)
    assert not beat.cancel_requested
    row = read(database, job_id)
    assert (row.lease_expires_at - before).total_seconds() > 25
    assert (row.phase, row.progress["fraction"]) == ("learning", 0.5)
    with database.write() as session:
        request_cancel(session, job_id, None)
    with database.write() as session:
        assert heartbeat(session, job_id, claimed.epoch, lease_seconds=30).cancel_requested
        assert heartbeat(session, job_id, claimed.epoch + 1, lease_seconds=30) is None


@pytest.mark.parametrize(
    ("finish", "state"),
    [
        (lambda session, job, epoch: finish_succeeded(session, job, epoch, RESULT), "succeeded"),
        (lambda session, job, epoch: finish_failed(session, job, epoch, PROBLEM), "failed"),
        (finish_canceled, "canceled"),
    ],
)
def test_an_end_is_final(database, submit, take, finish, state):
    job_id = submit()
    take()
    with database.write() as session:
        assert finish(session, job_id, 1)
    row = read(database, job_id)
    assert (row.state, row.lease_expires_at) == (state, None)
    assert outcomes(database, job_id) == [state]
    with database.write() as session:
        assert not finish_succeeded(session, job_id, 1, RESULT)
        assert not finish_failed(session, job_id, 1, PROBLEM)
        assert requeue(session, job_id, 1, outcome=AttemptOutcome.CRASHED, delay_seconds=0, counted=True) is None
        assert heartbeat(session, job_id, 1, lease_seconds=1) is None
    with database.read() as session:
        assert list_events(session, job_id, 0, 10)[-1].data["state"] == state


def test_every_write_of_a_stale_attempt_is_refused(database, submit, take):
    job_id = submit()
    stale = take(lease_seconds=0.01)
    time.sleep(0.05)
    assert expire(database) == {job_id: JobState.QUEUED}
    fresh = take()
    assert fresh.epoch == stale.epoch + 1
    file = {"blob_key": "k", "sha256": "0" * 64, "bytes": 1}
    rank = RankRow(step=0, layer="a", term=0, form=Form.DENSE)
    refused = [
        lambda s: append_events(s, job_id, stale.epoch, [(EventKind.LOG, {})]) is False,
        lambda s: insert_checkpoint(s, job_id, stale.epoch, position=1, **file) is None,
        lambda s: insert_artifact(s, job_id, stale.epoch, name="n", format="report", **file) is None,
        lambda s: insert_layers(s, job_id, stale.epoch, [LayerFacts(position=0, name="a", kind="linear")]) is False,
        lambda s: insert_rank_rows(s, job_id, stale.epoch, [rank]) is False,
        lambda s: set_resolved_spec(s, job_id, stale.epoch, {}) is False,
        lambda s: heartbeat(s, job_id, stale.epoch, lease_seconds=1) is None,
        lambda s: finish_succeeded(s, job_id, stale.epoch, RESULT) is False,
        lambda s: finish_failed(s, job_id, stale.epoch, PROBLEM) is False,
        lambda s: finish_canceled(s, job_id, stale.epoch) is False,
        lambda s: requeue(s, job_id, stale.epoch, outcome=AttemptOutcome.LOST, delay_seconds=0, counted=True) is None,
    ]
    before = read(database, job_id)
    for write in refused:
        with database.write() as session:
            assert write(session)
    after = read(database, job_id)
    assert (after.state, after.lease_epoch, after.last_event) == ("running", fresh.epoch, before.last_event)
    with database.read() as session:
        assert list_checkpoints(session, job_id) == []
        assert list_artifacts(session, job_id) == []


def test_attempts_without_progress_end_as_worker_lost(database, submit, take):
    job_id = submit(max_attempts=3)
    assert [crash(database, take(), detail="signal 9") for _ in range(3)] == ["queued", "queued", "failed"]
    row = read(database, job_id)
    assert row.problem["code"] == "WORKER_LOST"
    assert "signal 9" in row.problem["detail"]
    assert outcomes(database, job_id) == ["crashed"] * 3


def test_a_failure_of_its_own_is_told_when_attempts_are_used_up(database, submit, take):
    job_id = submit(max_attempts=1)
    assert crash(database, take(), problem=PROBLEM) == "failed"
    assert read(database, job_id).problem["code"] == "DIVERGED"


def test_a_drain_is_not_counted(database, submit, take):
    submit(max_attempts=1)
    for _ in range(3):
        claimed = take()
        assert claimed.attempt == 1
        assert crash(database, claimed, outcome=AttemptOutcome.DRAINED, counted=False) == "queued"


def test_a_new_checkpoint_resets_the_count_and_a_repeated_one_does_not(database, submit, take):
    job_id = submit(max_attempts=2)
    for step in range(4):
        claimed = take()
        checkpoint(database, claimed, step)
        assert crash(database, claimed) == "queued"
    for expected in ("queued", "failed"):
        claimed = take()
        checkpoint(database, claimed, 3)
        assert crash(database, claimed) == expected
    assert read(database, job_id).problem["code"] == "WORKER_LOST"


def test_the_two_newest_checkpoints_are_kept(database, submit, take):
    job_id = submit()
    claimed = take()
    assert [checkpoint(database, claimed, step) for step in (1, 2, 3)] == [[], [], ["c1"]]
    with database.read() as session:
        assert [row.position for row in list_checkpoints(session, job_id)] == [3, 2]
    crash(database, claimed)
    second = take()
    assert [row.position for row in second.checkpoints] == [3, 2]
    # A resumed attempt whose newest checkpoint was damaged goes on from the one before: its own is the newest.
    # The older row of the same key is dropped, but its blob is still spoken of.
    assert checkpoint(database, second, 2) == []
    with database.read() as session:
        assert latest_checkpoint(session, job_id).epoch == second.epoch
    with database.write() as session:
        finish_succeeded(session, job_id, second.epoch, RESULT)
    with database.write() as session:
        assert drop_finished_checkpoints(session, keep_seconds=60) == ["c2", "c3"]
        assert drop_finished_checkpoints(session, keep_seconds=60) == []


def test_a_requeue_waits_its_delay(database, submit, take):
    submit()
    assert crash(database, take(), delay_seconds=60) == "queued"
    assert claim_job(database) is None


def test_backoff_grows_to_its_cap():
    assert [backoff_seconds(n, 2, 100) for n in (0, 1, 2, 3, 9)] == [2, 2, 8, 32, 100]


def test_expired_leases_wait_for_the_grace(database, submit, take):
    job_id = submit()
    take(lease_seconds=0.01)
    time.sleep(0.05)
    assert expire(database, grace_seconds=10) == {}
    assert expire(database) == {job_id: "queued"}
    assert outcomes(database, job_id) == ["lost"]


def test_an_expired_lease_of_a_flagged_job_cancels_it(database, submit, take):
    job_id = submit()
    take(lease_seconds=0.01)
    with database.write() as session:
        request_cancel(session, job_id, None)
    time.sleep(0.05)
    assert expire(database) == {job_id: "canceled"}


def test_a_start_that_owns_the_data_releases_every_lease(database, submit, take):
    ids = [submit(), submit()]
    take(), take()
    with database.write() as session:
        assert release_all_leases(session) == dict.fromkeys(ids, "queued")
    assert {take().job_id, take().job_id} == set(ids)


def test_time_without_a_worker_is_not_run_time(database, submit, take):
    job_id = submit()
    take(lease_seconds=0.1)
    time.sleep(0.4)
    expire(database)
    assert 0 < read(database, job_id).run_seconds_used < 0.3
    assert take().run_seconds_used > 0


def test_attempts_left_open_are_closed(database, submit, take):
    job_id = submit()
    take()
    with database.write() as session:
        assert close_lost_attempts(session) == 0
        values = {"state": "queued", "lease_expires_at": None}
        session.execute(update(Job).where(Job.id == job_id).values(values))
        assert close_lost_attempts(session) == 1
    assert outcomes(database, job_id) == ["lost"]


def test_artifacts_belong_to_the_jobs_owner_and_are_replaced_by_name(database, submit, take):
    job_id = submit()
    claimed = take()
    file = {"name": "model.pt", "format": "torchscript", "sha256": "0" * 64, "bytes": 1}
    with database.write() as session:
        first = insert_artifact(session, job_id, claimed.epoch, blob_key="a", **file)
        second = insert_artifact(session, job_id, claimed.epoch, blob_key="b", **file)
    with database.read() as session:
        assert [row.id for row in list_artifacts(session, job_id)] == [second]
        assert get_artifact(session, first, "owner") is None
        assert get_artifact(session, second, "owner").blob_key == "b"
        assert get_artifact(session, second, "someone else") is None
