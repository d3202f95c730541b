"""A COMMIT that fails at submit: a 5xx and no job, on both databases, and never a 202 for a job that is not there."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from service.app import create_app
from service.store.migration import migrate
from service.store.session import Database
from service.store.tables import Base
from tests.api.conftest import HEADERS, Api, MakeServices, assert_problem

TRIGGER = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no job today'; END $$;
CREATE CONSTRAINT TRIGGER refuse_at_commit AFTER INSERT ON jobs DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION refuse();
"""
UNTRIGGER = "DROP TRIGGER IF EXISTS refuse_at_commit ON jobs; DROP FUNCTION IF EXISTS refuse()"


@pytest.fixture(params=["sqlite", "postgresql"])
def service(request: pytest.FixtureRequest, make_services: MakeServices) -> Iterator[Api]:
    knobs: dict[str, Any] = {}
    if request.param == "postgresql":
        knobs = {"database_url": request.getfixturevalue("postgres_url"), "broker_url": "redis://127.0.0.1:1/0"}
    services = make_services(migrated=not knobs, **knobs)
    if knobs:
        migrate(services.database)
        empty(services.database)
    with TestClient(create_app(services), headers=HEADERS) as client:
        yield Api(services, client)


def empty(database: Database) -> None:
    with database.write() as session:
        for table in reversed(Base.metadata.sorted_tables):
            session.execute(table.delete())


def assert_nothing_was_accepted(service: Api, rung: list[str]) -> None:
    assert service.jobs() == []
    assert rung == []
    assert service.client.get("/v1/models").json()["items"] == []  # the whole transaction is gone
    assert service.staged() == []


@pytest.fixture
def rung(service: Api, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    monkeypatch.setattr(service.services.bell, "ring_soon", seen.append)
    return seen


@pytest.mark.parametrize("way", ["submit", "retry"])
def test_a_database_that_goes_away_at_the_commit(service: Api, rung: list[str], way: str) -> None:
    headers = {"Idempotency-Key": "k"}
    if way == "retry":
        job_id = service.job_id()
        service.client.post(f"/v1/jobs/{job_id}/cancel")
    before = len(service.jobs())
    rung.clear()
    armed = [True]

    @event.listens_for(service.services.database.engine, "commit")
    def fail(connection: Any) -> None:
        inserted = connection.exec_driver_sql("SELECT count(*) FROM jobs").scalar_one() > before
        if armed and inserted:
            armed.clear()
            raise OperationalError("COMMIT", {}, Exception("server closed the connection unexpectedly"))

    def ask() -> Any:
        if way == "retry":
            return service.client.post(f"/v1/jobs/{job_id}/retry", headers=headers)
        return service.submit(headers=headers)

    assert_problem(ask(), 503, "UNAVAILABLE")
    if way == "submit":
        assert_nothing_was_accepted(service, rung)
    assert len(service.jobs()) == before
    assert rung == []
    assert ask().status_code == 202  # the key is free again, and no connection is left in the transaction
    assert len(service.jobs()) == before + 1


@pytest.mark.parametrize("way", ["submit", "retry"])
def test_a_commit_whose_answer_is_lost(service: Api, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    headers = {"Idempotency-Key": "k"}
    job_id = service.job_id()
    service.client.post(f"/v1/jobs/{job_id}/cancel")
    before = len(service.jobs())
    write, armed = service.services.database.write, [True]

    @contextmanager
    def lose_the_answer() -> Iterator[Session]:
        with write() as session:
            yield session
        if armed and len(service.jobs()) > before:
            armed.clear()
            raise OperationalError("COMMIT", {}, Exception("server closed the connection unexpectedly"))

    monkeypatch.setattr(service.services.database, "write", lose_the_answer)

    def ask() -> Any:
        if way == "retry":
            return service.client.post(f"/v1/jobs/{job_id}/retry", headers=headers)
        return service.submit(headers=headers)

    problem = assert_problem(ask(), 503, "UNAVAILABLE")
    assert "may or may not have been done" in problem["detail"]
    assert "same Idempotency-Key" in problem["detail"]
    again = ask()
    assert again.status_code in {200, 202}
    assert again.headers["idempotency-replayed"] == "true"
    assert len(service.jobs()) == before + 1
    assert again.json()["id"] in {job["id"] for job in service.jobs()}


@pytest.mark.parametrize("service", ["postgresql"], indirect=True)
def test_a_commit_that_postgresql_itself_refuses(service: Api, rung: list[str]) -> None:
    """SQLite's own refusal of a COMMIT has a test beside the other submissions."""
    database = service.services.database
    with database.write() as session:
        session.execute(text(TRIGGER))
    try:
        answer = service.submit(headers={"Idempotency-Key": "k"})
        assert_problem(answer, 500, "INTERNAL")
        assert "no job today" not in answer.text
        assert_nothing_was_accepted(service, rung)
    finally:
        with database.write() as session:
            session.execute(text(UNTRIGGER))
    assert service.submit(headers={"Idempotency-Key": "k"}).status_code == 202
    assert len(service.jobs()) == 1
    assert rung == ["cpu"]
