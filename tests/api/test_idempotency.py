"""Idempotency-Key: one job for one key, whatever is sent twice and whenever."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.jobs import idempotency
from service.store.idempotency import Fresh
from tests.api import archives
from tests.api.conftest import HEADERS, SPEC, Api, assert_problem


def submit(api: Api, key: str = "key-1", spec: Any = None, **kwargs: Any) -> Any:
    return api.submit(spec, headers={"Idempotency-Key": key}, **kwargs)


def test_replay_gives_the_first_job(api: Api) -> None:
    first, again = submit(api), submit(api)
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json()["id"] == again.json()["id"]
    assert again.headers["location"] == first.headers["location"]
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert len(api.jobs()) == 1
    assert api.staged() == []


def test_another_key_is_another_job(api: Api) -> None:
    assert submit(api).json()["id"] != submit(api, "key-2").json()["id"]


@pytest.mark.parametrize(
    "change",
    [
        {"spec": {"budget": {"max_macs_fraction": 0.4}}},
        {"model": archives.torchscript(weight=b"\1" * 256)},
        {"data": archives.npz(16)},
    ],
)
def test_another_request_under_the_key(api: Api, change: dict[str, Any]) -> None:
    submit(api)
    assert_problem(submit(api, **change), 422, "IDEMPOTENCY_MISMATCH")
    assert len(api.jobs()) == 1
    assert api.staged() == []


def test_first_still_in_flight(api: Api) -> None:
    idempotency.reserve(api.services, "default", "key-1")
    answer = submit(api)
    assert_problem(answer, 409, "IDEMPOTENCY_IN_FLIGHT")
    assert "retry-after" in answer.headers
    assert api.jobs() == []


def test_refused_request_frees_the_key(api: Api) -> None:
    assert_problem(submit(api, model=b"junk"), 422, "MODEL_NOT_TORCHSCRIPT")
    assert_problem(submit(api, spec={}), 422, "SIZE_MISSING")
    assert submit(api).status_code == 202


def test_failed_request_frees_the_key(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("service.jobs.submit.jobs.insert_job", fail)
    assert_problem(submit(api), 500, "INTERNAL")
    monkeypatch.undo()
    assert submit(api).status_code == 202


def test_reservation_that_was_taken_over_accepts_nothing(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "reserve", lambda *_: Fresh("req_00000000000000000000000000"))
    assert_problem(submit(api), 409, "IDEMPOTENCY_IN_FLIGHT")
    assert api.jobs() == []


def test_restart_frees_what_a_crash_left_in_flight(api: Api) -> None:
    idempotency.reserve(api.services, "default", "key-1")
    with TestClient(create_app(api.services), headers=HEADERS) as client:
        assert submit(Api(api.services, client)).status_code == 202


@pytest.mark.parametrize("key", ["", " ", "two words", "k" * 256, "k\u00e9"])
def test_keys_that_are_refused(api: Api, key: str) -> None:
    answer = api.client.post("/v1/jobs", json={}, headers={b"Idempotency-Key": key.encode("latin-1")})
    assert_problem(answer, 422, "REQUEST_INVALID")


def test_longest_key(api: Api) -> None:
    assert submit(api, "k" * 255).status_code == 202


def test_json_requests_too(api: Api) -> None:
    model = api.client.post("/v1/models", content=archives.torchscript()).json()["id"]
    dataset = api.client.post("/v1/datasets", content=archives.npz()).json()["id"]
    body = {"model_id": model, "dataset_id": dataset, "spec": SPEC}
    reordered = dict(reversed(body.items()))
    first = api.client.post("/v1/jobs", json=body, headers={"Idempotency-Key": "j"})
    again = api.client.post("/v1/jobs", json=reordered, headers={"Idempotency-Key": "j"})
    assert first.json()["id"] == again.json()["id"]
    other = api.client.post("/v1/jobs", json={**body, "name": "x"}, headers={"Idempotency-Key": "j"})
    assert_problem(other, 422, "IDEMPOTENCY_MISMATCH")
