"""POST /v1/jobs/{id}/retry: a new job in place of one that failed or was canceled."""

from typing import Any

import pytest
from sqlalchemy import select

from service.contract.errors import ErrorCode, ProblemError
from service.contract.plan import Form, RankRow
from service.contract.resources import ResultSummary
from service.reconcile import Reconciler
from service.store.attempts import Claim, finish_canceled, finish_failed, finish_succeeded
from service.store.checkpoints import insert_checkpoint, list_checkpoints
from service.store.ranks import insert_rank_rows, rank_history
from service.store.tables import Job
from tests.api import archives
from tests.api.conftest import SPEC, Api, assert_problem

PROBLEM = ProblemError(ErrorCode.DIVERGED, "the loss is not finite").problem()
RESULT = ResultSummary(params_fraction=0.4, macs_fraction=0.3, file_bytes_fraction=0.5)


def checkpoint(api: Api, claimed: Claim, position: int) -> str:
    """Store a state as a worker does, and return its key."""
    with api.services.blobs.writer(limit_bytes=100) as writer:
        writer.write(f"{claimed.job_id} {position}".encode())
        staged = writer.finish()
    key = api.services.blobs.keep(staged)
    with api.services.database.write() as session:
        dropped = insert_checkpoint(
            session,
            claimed.job_id,
            claimed.epoch,
            position=position,
            blob_key=key,
            sha256=staged.sha256,
            bytes=staged.bytes,
        )
    for unused in dropped or []:
        api.services.blobs.delete(unused)
    return key


def fail(api: Api, claimed: Claim) -> None:
    with api.services.database.write() as session:
        assert finish_failed(session, claimed.job_id, claimed.epoch, PROBLEM)


def failed_job(api: Api, *positions: int) -> tuple[str, list[str]]:
    """A job that has failed after these checkpoints, and their keys."""
    job_id = api.job_id()
    claimed = api.claim()
    keys = [checkpoint(api, claimed, position) for position in positions]
    fail(api, claimed)
    return job_id, keys


def retry(api: Api, job_id: str, query: str = "", **kwargs: Any) -> Any:
    return api.client.post(f"/v1/jobs/{job_id}/retry{query}", **kwargs)


def log_lines(api: Api, job_id: str) -> list[str]:
    lines = api.client.get(f"/v1/jobs/{job_id}/events").json()["items"]
    return [line["data"]["message"] for line in lines if line["kind"] == "log"]


def test_retry_is_a_new_job_of_the_same_things(api: Api) -> None:
    old_id, _ = failed_job(api)
    answer = retry(api, old_id)
    assert answer.status_code == 202, answer.text
    job, old = answer.json(), api.client.get(f"/v1/jobs/{old_id}").json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["id"] != old_id, job["retry_of"], job["state"], job["attempt"]) == (True, old_id, "queued", 0)
    for same in ("model_id", "dataset_id", "requested_spec", "spec", "name", "priority", "queue"):
        assert job[same] == old[same]
    assert (old["state"], old["retry_of"]) == ("failed", None)
    assert log_lines(api, job["id"]) == [f"retry of job {old_id}, from the start"]


def test_retry_goes_on_from_the_last_checkpoints(api: Api) -> None:
    old_id, keys = failed_job(api, 10, 20, 30)
    new_id = retry(api, old_id).json()["id"]
    assert log_lines(api, new_id) == [f"retry of job {old_id}, from its checkpoint at update 30"]
    claimed = api.claim()
    assert claimed.job_id == new_id
    assert [(row.position, row.blob_key, row.epoch) for row in claimed.checkpoints] == [
        (30, keys[2], 0),
        (20, keys[1], 0),
    ]


def test_a_retry_of_a_retry_too(api: Api) -> None:
    old_id, keys = failed_job(api, 10)
    second = retry(api, old_id).json()["id"]
    fail(api, api.claim())
    third = retry(api, second).json()
    assert third["retry_of"] == second
    assert [row.blob_key for row in api.claim().checkpoints] == keys


def test_retry_from_the_start(api: Api) -> None:
    old_id, _ = failed_job(api, 10)
    new_id = retry(api, old_id, "?from=start").json()["id"]
    assert api.claim().checkpoints == []
    assert log_lines(api, new_id) == [f"retry of job {old_id}, from the start"]
    assert_problem(retry(api, old_id, "?from=middle"), 422, "REQUEST_INVALID")


def test_shared_bytes_are_deleted_with_their_last_row(api: Api) -> None:
    old_id, (key,) = failed_job(api, 10)
    retry(api, old_id)
    blobs, database = api.services.blobs, api.services.database
    sweeper = Reconciler(database, api.services.bell, api.services.settings, blobs)
    assert api.client.delete(f"/v1/jobs/{old_id}").status_code == 204
    assert sweeper.finished_checkpoints() == 0
    assert blobs.exists(key)
    claimed = api.claim()
    for position in (20, 30):
        checkpoint(api, claimed, position)  # the two newest are kept
    assert not blobs.exists(key)
    with database.write() as session:
        finish_succeeded(session, claimed.job_id, claimed.epoch, RESULT)
    assert sweeper.finished_checkpoints() == 2
    with database.read() as session:
        assert list_checkpoints(session, claimed.job_id) == []


def test_progress_of_a_retry_is_beyond_its_first_checkpoint(api: Api) -> None:
    old_id, _ = failed_job(api, 10)
    retry(api, old_id)
    claimed = api.claim()
    for position, attempts in ((10, 1), (11, 0)):
        checkpoint(api, claimed, position)
        with api.services.database.read() as session:
            assert session.scalars(select(Job.attempt).where(Job.id == claimed.job_id)).one() == attempts


def test_rank_configurations_go_along(api: Api) -> None:
    old_id = api.job_id()
    claimed = api.claim()
    rows = [RankRow(step=step, layer="fc", term=0, form=Form.MATRIX, rank=3, chosen=step == 1) for step in (0, 1)]
    with api.services.database.write() as session:
        insert_rank_rows(session, old_id, claimed.epoch, rows)
    checkpoint(api, claimed, 10)
    fail(api, claimed)
    retry(api, old_id)
    claimed = api.claim()
    with api.services.database.write() as session:
        assert [(row.step, row.chosen) for row in rank_history(session, claimed.job_id)] == [(0, False), (1, False)]
        insert_rank_rows(session, claimed.job_id, claimed.epoch, rows[1:])
        assert [(row.step, row.chosen) for row in rank_history(session, claimed.job_id)] == [(0, False), (1, True)]


def test_canceled_jobs_and_permanent_failures_may_be_retried(api: Api) -> None:
    job_id = api.job_id()
    api.client.post(f"/v1/jobs/{job_id}/cancel")
    assert retry(api, job_id).status_code == 202
    running = api.claim()
    with api.services.database.write() as session:
        finish_canceled(session, running.job_id, running.epoch)
    assert retry(api, running.job_id).status_code == 202


def test_limits_are_those_of_now(api: Api) -> None:
    old_id = api.submit({**SPEC, "max_attempts": 7, "priority": -3}).json()["id"]
    fail(api, api.claim())
    job = retry(api, old_id).json()
    assert job["priority"] == -3
    claimed = api.claim()
    assert (claimed.max_attempts, claimed.attempt, claimed.run_seconds_used) == (7, 1, 0)


def test_jobs_that_cannot_be_retried(api: Api) -> None:
    job_id = api.job_id()
    assert "is queued: cancel it first" in assert_problem(retry(api, job_id), 409, "STATE_CONFLICT")["detail"]
    claimed = api.claim()
    assert "is running" in assert_problem(retry(api, job_id), 409, "STATE_CONFLICT")["detail"]
    with api.services.database.write() as session:
        finish_succeeded(session, job_id, claimed.epoch, RESULT)
    assert "has succeeded" in assert_problem(retry(api, job_id), 409, "STATE_CONFLICT")["detail"]
    assert_problem(retry(api, "job_00000000000000000000000000"), 404, "NOT_FOUND")
    assert len(api.jobs()) == 1


@pytest.mark.parametrize(("kind", "field"), [("models", "model_id"), ("datasets", "dataset_id")])
def test_a_deleted_file_is_named_and_can_be_brought_back(api: Api, kind: str, field: str) -> None:
    job_id, _ = failed_job(api)
    file_id = api.client.get(f"/v1/jobs/{job_id}").json()[field]
    assert api.client.delete(f"/v1/{kind}/{file_id}").status_code == 204
    problem = assert_problem(retry(api, job_id), 409, "STATE_CONFLICT")
    assert f"{file_id} of job {job_id}; it was deleted: upload the same file again" in problem["detail"]
    content = archives.torchscript() if kind == "models" else archives.npz()
    assert api.client.post(f"/v1/{kind}", content=content).json()["id"] == file_id
    assert retry(api, job_id).status_code == 202


def test_the_idempotency_key_holds_for_retries(api: Api) -> None:
    job_id, _ = failed_job(api)
    headers = {"Idempotency-Key": "again"}
    first, second = (retry(api, job_id, headers=headers) for _ in range(2))
    assert first.json()["id"] == second.json()["id"]
    assert second.headers["idempotency-replayed"] == "true"
    assert len(api.jobs()) == 2
    assert_problem(retry(api, job_id, "?from=start", headers=headers), 422, "IDEMPOTENCY_MISMATCH")
    assert_problem(api.submit(headers=headers), 422, "IDEMPOTENCY_MISMATCH")


def test_a_refused_retry_frees_its_key(api: Api) -> None:
    job_id = api.job_id()
    headers = {"Idempotency-Key": "again"}
    assert_problem(retry(api, job_id, headers=headers), 409, "STATE_CONFLICT")
    fail(api, api.claim())
    assert retry(api, job_id, headers=headers).status_code == 202
