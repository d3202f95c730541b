"""Health: alive, ready, degraded, unavailable."""

import shutil

import pytest
from starlette.testclient import TestClient

from service.app import create_app
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


def test_unavailable_without_the_blob_store(api: Api) -> None:
    shutil.rmtree(api.services.settings.data_dir / "blobs")
    (api.services.settings.data_dir / "blobs").write_text("in the way")
    ready = api.client.get("/v1/health/ready")
    assert (ready.status_code, ready.json()["status"]) == (503, "unavailable")
    assert ready.json()["checks"]["blobs"] != "ok"
