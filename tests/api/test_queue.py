"""Priorities, deadlines in the queue and attempts, as a spec asks for them."""

from typing import Any

import pytest
from sqlalchemy import update

from service.reconcile import Reconciler
from service.store.tables import Job
from service.store.time import database_time
from tests.api.conftest import SPEC, Api, assert_problem


def submit(api: Api, **more: Any) -> str:
    answer = api.submit({**SPEC, **more})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def test_lower_priorities_are_before_others(api: Api) -> None:
    ordinary, late, urgent, second = (submit(api, priority=priority) for priority in (0, 100, -100, 0))
    expected = [urgent, ordinary, second, late]
    places = {job["id"]: job["queue_position"] for job in api.jobs()}
    assert sorted(places, key=lambda job_id: int(places[job_id])) == expected
    assert api.client.get(f"/v1/jobs/{late}").json()["queue_position"] == 4
    assert api.client.get(f"/v1/jobs/{late}").json()["priority"] == 100
    assert [api.claim().job_id for _ in expected] == expected
    assert api.client.get(f"/v1/jobs/{late}").json()["queue_position"] is None


def test_a_job_that_waited_too_long_says_why(api: Api) -> None:
    job_id = submit(api, deadlines={"queue_seconds": 2.5}, device="cpu")
    services = api.services
    with services.database.write() as session:
        times = {"created_at": database_time(-9), "queue_expires_at": database_time(-6.5)}
        session.execute(update(Job).values(times))
    assert Reconciler(services.database, services.bell, services.settings, services.blobs).overdue_jobs() == 1
    job = api.client.get(f"/v1/jobs/{job_id}").json()
    assert (job["state"], job["problem"]["code"]) == ("failed", "TIMEOUT")
    said = job["problem"]["detail"]
    assert "deadlines.queue_seconds = 2.5 s; it waited 9." in said
    assert "the queue cpu, which no live worker serves: start one with `rankpress worker --queue cpu`" in said
    again = api.client.post(f"/v1/jobs/{job_id}/retry").json()
    assert again["state"] == "queued"
    assert api.claim().job_id == again["id"]  # its time began anew


def test_attempts_are_those_of_the_spec(api: Api) -> None:
    submit(api, max_attempts=9)
    submit(api)
    assert [api.claim().max_attempts for _ in range(2)] == [9, api.services.settings.max_attempts]


@pytest.mark.parametrize(
    ("wrong", "pointer"),
    [
        ({"priority": 101}, "/priority"),
        ({"priority": 0.5}, "/priority"),
        ({"max_attempts": 0}, "/max_attempts"),
        ({"deadlines": {"queue_seconds": 0}}, "/deadlines/queue_seconds"),
        ({"resources": {"min_gpu_memory_bytes": -1}}, "/resources/min_gpu_memory_bytes"),
    ],
)
def test_values_that_cannot_be(api: Api, wrong: dict[str, Any], pointer: str) -> None:
    problem = assert_problem(api.submit({**SPEC, **wrong}), 422, "SPEC_INVALID")
    assert [error["pointer"] for error in problem["errors"]] == [pointer]
