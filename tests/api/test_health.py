"""Health: alive, ready, degraded, unavailable."""

import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.contract.ids import WORKER, new_id
from service.jobs.readiness import Readiness
from service.services import build_services
from service.settings import Settings
from service.store.workers import register_worker, retire_worker
from tests.api.conftest import HEADERS, Api, MakeServices


def test_live_and_ready(api: Api) -> None:
    assert api.client.get("/v1/health/live").json()["status"] == "live"
    ready = api.client.get("/v1/health/ready")
    assert (ready.status_code, ready.json()["status"]) == (200, "ready")
    assert set(ready.json()["checks"].values()) == {"ok"}


def test_degraded_without_the_broker_and_jobs_are_accepted(make_services: MakeServices) -> None:
    services = make_services(broker_url="redis://127.0.0.1:1/0")
    with TestClient(create_app(services), headers=HEADERS) as client:
        ready = client.get("/v1/health/ready")
        assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
        assert Api(services, client).submit().status_code == 202


def test_unavailable_without_the_schema(make_services: MakeServices) -> None:
    services = make_services(migrated=False)
    with TestClient(create_app(services), headers=HEADERS) as client:
        ready = client.get("/v1/health/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "unavailable")
        assert ready.json()["checks"]["database"] == "ok"
        assert "migrate" in ready.json()["checks"]["schema"]
        assert client.get("/v1/health/live").status_code == 200


def test_unavailable_without_the_database(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.services.database, "ping", lambda: False)
    ready = api.client.get("/v1/health/ready")
    assert (ready.status_code, ready.json()["status"]) == (503, "unavailable")
    assert "database" in ready.json()["checks"]["workers"]


def test_degraded_while_jobs_wait_for_a_worker_that_is_not_there(api: Api) -> None:
    api.job_id()
    ready = api.client.get("/v1/health/ready")
    assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
    assert "1 job waits in the queue cpu" in ready.json()["checks"]["workers"]
    with api.services.database.write() as session:
        register_worker(session, new_id(WORKER), host="h", pid=1, queues=["gpu"], slots=1)
    assert api.client.get("/v1/health/ready").json()["status"] == "degraded"
    with api.services.database.write() as session:
        register_worker(session, new_id(WORKER), host="h", pid=2, queues=["cpu"], slots=1)
    assert api.client.get("/v1/health/ready").json()["status"] == "ready"


def test_a_part_that_hangs_is_not_waited_for(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database says nothing, as after a cable was cut: readiness and liveness answer all the same."""
    answered = threading.Event()
    asked: list[int] = []

    def hang() -> bool:
        asked.append(1)
        answered.wait(20)
        return True

    readiness = Readiness(api.services)
    monkeypatch.setattr(api.services.database, "ping", hang)
    for _ in range(5):
        began = time.monotonic()
        health = readiness.check(seconds=0.2)
        assert time.monotonic() - began < 1
        assert (health.status, health.checks["database"]) == ("unavailable", "did not answer within 0.2 s")
        assert health.checks["broker"] == "ok"
    assert len(asked) == 1, "what hangs holds one thread, however often it is asked"
    answered.set()
    monkeypatch.undo()
    assert readiness.check(seconds=10).status == "ready"


def test_a_database_that_is_away_is_told_in_time(tmp_path: Path) -> None:
    """A server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql+psycopg://u@127.0.0.1:{silent.getsockname()[1]}/d"
        services = build_services(Settings(data_dir=tmp_path, broker_url="redis://127.0.0.1:1/0", database_url=url))
        with TestClient(create_app(services)) as client:
            began = time.monotonic()
            ready = client.get("/v1/health/ready")
            assert time.monotonic() - began <= 5
            assert (ready.status_code, ready.json()["status"]) == (503, "unavailable")
            assert "broker" in ready.json()["checks"]
    services.database.dispose()


def test_unavailable_without_the_blob_store(api: Api) -> None:
    shutil.rmtree(api.services.settings.data_dir / "blobs")
    (api.services.settings.data_dir / "blobs").write_text("in the way")
    ready = api.client.get("/v1/health/ready")
    assert (ready.status_code, ready.json()["status"]) == (503, "unavailable")
    assert ready.json()["checks"]["blobs"] != "ok"


def test_a_worker_that_has_just_gone_serves_nothing(api: Api) -> None:
    api.job_id()
    worker_id = new_id(WORKER)
    with api.services.database.write() as session:
        register_worker(session, worker_id, host="h", pid=1, queues=["cpu"], slots=1)
    assert api.client.get("/v1/health/ready").json()["status"] == "ready"
    with api.services.database.write() as session:
        retire_worker(session, worker_id)
    assert "1 job waits in the queue cpu" in api.client.get("/v1/health/ready").json()["checks"]["workers"]
