"""Submitting: multipart in every order, JSON with ids, the promise of the 202."""

import errno
import itertools
import json
import os
import sqlite3
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from service.app import create_app
from service.contract.spec import parse_spec
from tests.api import archives
from tests.api.conftest import HEADERS, KEY, SPEC, Api, assert_problem

BOUNDARY = "x-boundary-x"
PARTS: dict[str, tuple[str, bytes]] = {
    "model": ('name="model"; filename="résnet.pt"', archives.torchscript()),
    "data": ('name="data"; filename="train.npz"', archives.npz()),
    "spec": ('name="spec"', json.dumps(SPEC).encode()),
}


def multipart(parts: list[tuple[str, bytes]], *, end: str = "--\r\n") -> bytes:
    body = b"".join(
        f"--{BOUNDARY}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + content + b"\r\n"
        for head, content in parts
    )
    return body + f"--{BOUNDARY}{end}".encode()


def send(api: Api, body: Any) -> Any:
    return api.client.post(
        "/v1/jobs", content=body, headers={"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    )


@pytest.mark.parametrize("order", list(itertools.permutations(PARTS)))
def test_parts_in_any_order(api: Api, order: tuple[str, ...]) -> None:
    answer = send(api, multipart([PARTS[name] for name in order]))
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert job["state"] == "queued"
    assert job["queue_position"] == 1
    model = api.client.get(f"/v1/models/{job['model_id']}").json()
    assert model["name"] == "résnet.pt"
    assert model["bytes"] == len(archives.torchscript())


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_parts_in_chunks_of_any_size(api: Api, size: int) -> None:
    body = multipart([PARTS["spec"], PARTS["model"], PARTS["data"]])
    chunks = (body[start : start + size] for start in range(0, len(body), size))
    assert send(api, chunks).status_code == 202


def test_content_like_a_boundary_is_content(api: Api) -> None:
    tricky = archives.torchscript(weight=f"\r\n--{BOUNDARY[:-1]}\r\n--\r\n\r\r\n--".encode() * 50)
    answer = send(api, multipart([("name=model", tricky), PARTS["data"], PARTS["spec"]]))
    assert answer.status_code == 202
    assert api.client.get("/v1/models").json()["items"][0]["bytes"] == len(tricky)


def test_spec_as_a_file_part(api: Api) -> None:
    spec = ('name="spec"; filename="spec.json"\r\nContent-Type: application/json', json.dumps(SPEC).encode())
    assert send(api, multipart([spec, PARTS["model"], PARTS["data"]])).status_code == 202


def test_name_and_ids_as_parts(api: Api) -> None:
    model = api.client.post("/v1/models", content=archives.torchscript()).json()
    parts = [("name=model_id", model["id"].encode()), PARTS["data"], PARTS["spec"], ("name=name", b"nightly")]
    job = send(api, multipart(parts)).json()
    assert (job["model_id"], job["name"]) == (model["id"], "nightly")


def test_same_path_without_the_version(api: Api) -> None:
    answer = api.client.post(
        "/jobs", files={"model": archives.torchscript(), "data": archives.npz()}, data={"spec": json.dumps(SPEC)}
    )
    assert answer.status_code == 202
    assert api.client.get(f"/jobs/{answer.json()['id']}").status_code == 200


@pytest.mark.parametrize(
    ("parts", "pointer"),
    [
        ([PARTS["spec"]], "/model"),
        ([PARTS["model"]], "/spec"),
        ([*PARTS.values(), PARTS["spec"]], "/spec"),
        ([*PARTS.values(), PARTS["model"]], "/model"),
        ([*PARTS.values(), ("name=model_id", b"mdl_x")], "/model_id"),
        ([*PARTS.values(), ("name=modle", b"x")], "/modle"),
    ],
)
def test_parts_that_do_not_add_up(api: Api, parts: list[tuple[str, bytes]], pointer: str) -> None:
    problem = assert_problem(send(api, multipart(parts)), 422, "REQUEST_INVALID")
    assert problem["errors"][0]["pointer"] == pointer
    assert api.staged() == []
    assert api.jobs() == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"junk",
        multipart(list(PARTS.values()))[:-4],
        multipart(list(PARTS.values()), end="!"),
        multipart([("nothing", b"x")]),
        multipart([("name=name", b"x")] * 40),
        f"--{BOUNDARY}\r\n{'X: y' * 10_000}\r\n\r\n".encode(),
        f"--{BOUNDARY}\r\n".encode() + b"\x00: \x01\r\n\r\n",
    ],
)
def test_broken_multipart(api: Api, body: bytes) -> None:
    assert_problem(send(api, body), 422, "REQUEST_INVALID")
    assert api.staged() == []
    assert api.jobs() == []


def test_text_part_above_its_limit(api: Api) -> None:
    assert_problem(send(api, multipart([("name=name", b"x" * 2000)])), 413, "TOO_LARGE")
    assert_problem(send(api, multipart([("name=spec", b" " * 70_000)])), 413, "TOO_LARGE")


def test_declared_length_above_every_limit_is_refused_unread(api: Api) -> None:
    answer = api.client.post(
        "/v1/jobs",
        content=b"",
        headers={"content-type": f"multipart/form-data; boundary={BOUNDARY}", "content-length": "9999999999"},
    )
    assert_problem(answer, 413, "TOO_LARGE")


def test_json_with_ids(api: Api) -> None:
    model = api.client.post("/v1/models", content=archives.torchscript()).json()
    dataset = api.client.post("/v1/datasets", content=archives.safetensors()).json()
    body = {"model_id": model["id"], "dataset_id": dataset["id"], "spec": SPEC, "name": "again"}
    answer = api.client.post("/v1/jobs", json=body)
    assert answer.status_code == 202
    job = answer.json()
    assert (job["model_id"], job["dataset_id"], job["name"]) == (model["id"], dataset["id"], "again")


def test_spec_is_kept_as_sent_and_resolved(api: Api) -> None:
    spec = {"budget": {"max_params_fraction": 0.25}, "method": {"type": "learning_compression", "mu": {"steps": 5}}}
    job = api.submit(spec).json()
    assert job["requested_spec"] == spec
    assert job["spec"]["method"]["mu"]["growth"] == pytest.approx(700 ** (1 / 4))
    assert job["spec"]["fine_tune"]["epochs"] == 15
    assert job["spec"]["cost"] == "params"
    assert parse_spec(job["spec"]).on_the_wire() == job["spec"]


def test_accepted_job_is_whole(api: Api) -> None:
    job_id = api.job_id()
    events = api.client.get(f"/v1/jobs/{job_id}/events").json()["items"]
    assert [(line["id"], line["kind"], line["data"]) for line in events] == [(1, "state", {"state": "queued"})]
    claim = api.claim()
    assert claim.job_id == job_id


def test_bell_is_rung_after_the_commit(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(api.services.bell, "ring_soon", lambda queue: seen.append(api.jobs()[0]["state"]))
    api.submit()
    assert seen == ["queued"]


def test_failing_commit_accepts_nothing(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite itself refuses the COMMIT of the transaction that inserts the job."""
    armed: list[bool] = []
    rung: list[str] = []
    monkeypatch.setattr(api.services.bell, "ring_soon", rung.append)

    def authorize(action: int, what: str | None, *_: object) -> int:
        refused = armed and action == sqlite3.SQLITE_TRANSACTION and what == "COMMIT"
        return sqlite3.SQLITE_DENY if refused else sqlite3.SQLITE_OK

    @event.listens_for(api.services.database.engine, "checkout")
    def watch(connection: sqlite3.Connection, *_: object) -> None:
        connection.set_authorizer(authorize)

    def arm(*_: object) -> bool:
        armed.append(True)
        return True

    monkeypatch.setattr("service.jobs.idempotency.tie", arm)
    answer = api.submit(headers={"Idempotency-Key": "k"})
    assert answer.status_code >= 500
    assert answer.headers["content-type"] == "application/problem+json"
    armed.clear()
    assert api.jobs() == []
    assert rung == []
    monkeypatch.undo()
    assert api.submit(headers={"Idempotency-Key": "other"}).status_code == 202


@pytest.mark.parametrize("table", ["jobs", "models"])
def test_database_away_is_told(api: Api, table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise OperationalError("SELECT", {}, Exception("connection refused"))

    monkeypatch.setattr(api.services.database, "read", away)
    answer = api.client.get(f"/v1/{table}")
    assert_problem(answer, 503, "UNAVAILABLE")
    assert answer.headers["retry-after"]
    assert answer.json()["detail"] == "the database does not answer now; the same request can be sent again"
    assert "may or may not" in assert_problem(api.submit(), 503, "UNAVAILABLE")["detail"]
    assert api.staged() == []


def test_unexpected_error_is_told_without_its_text(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("secret inside")

    monkeypatch.setattr("service.jobs.submit.jobs.insert_job", fail)
    answer = api.submit()
    problem = assert_problem(answer, 500, "INTERNAL")
    assert "secret" not in answer.text
    assert problem["request_id"]
    assert api.staged() == []
    assert api.jobs() == []


def test_full_disk(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert_problem(api.submit(), 507, "STORAGE_FULL")
    assert api.staged() == []
    monkeypatch.undo()
    assert api.submit().status_code == 202


def test_dry_run_checks_and_starts_nothing(api: Api) -> None:
    body: dict[str, Any] = {
        "files": {"model": archives.torchscript(), "data": archives.npz()},
        "data": {"spec": json.dumps(SPEC)},
    }
    answer = api.client.post("/v1/jobs?dry_run=true", **body)
    assert answer.status_code == 200
    assert answer.json()["spec"]["cost"] == "macs"
    assert api.jobs() == []
    assert api.staged() == []
    assert api.client.get("/v1/models").json()["items"] == []
    refused = api.client.post("/v1/jobs?dry_run=true", **body | {"data": {"spec": "{}"}})
    assert_problem(refused, 422, "SIZE_MISSING")


def test_no_queue_position_for_jobs_that_run(api: Api) -> None:
    first, second = api.job_id(), api.job_id()
    api.claim()
    assert api.client.get(f"/v1/jobs/{first}").json()["queue_position"] is None
    assert api.client.get(f"/v1/jobs/{second}").json()["queue_position"] == 1


def test_components_start_and_stop_with_the_application(api: Api) -> None:
    order: list[str] = []

    class Part:
        def __init__(self, name: str) -> None:
            self.name = name

        def start(self) -> None:
            order.append(f"+{self.name}")

        def stop(self) -> None:
            order.append(f"-{self.name}")

    with TestClient(create_app(api.services, components=[Part("a"), Part("b")]), headers=HEADERS):
        assert order == ["+a", "+b"]
    assert order == ["+a", "+b", "-b", "-a"]
    assert KEY not in repr(api.services)
