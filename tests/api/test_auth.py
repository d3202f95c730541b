"""Every road but health, metrics, OpenAPI and the docs page asks for the key, before it reads a body."""

import time
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.contract.keys import new_api_key
from service.jobs import authentication
from service.jobs.authentication import Authenticator
from service.keys_file import ensure_api_key
from service.services import Services, build_services
from service.settings import Settings
from service.store.keys import insert_key, revoke_key
from service.store.session import Database
from tests.api.conftest import HEADERS, KEY, Api, MakeServices, assert_problem

PROTECTED = [
    ("GET", "/v1/jobs"),
    ("POST", "/v1/jobs"),
    ("GET", "/jobs"),
    ("POST", "/jobs"),
    ("GET", "/v1/jobs/job_00000000000000000000000000"),
    ("POST", "/v1/jobs/job_00000000000000000000000000/cancel"),
    ("GET", "/v1/jobs/job_00000000000000000000000000/report"),
    ("POST", "/v1/models"),
    ("GET", "/v1/models"),
    ("POST", "/v1/datasets"),
    ("GET", "/v1/datasets/nothing"),
    ("GET", "/v1/artifacts/art_00000000000000000000000000/content"),
    ("GET", "/v1/capabilities"),
    ("GET", "/v1/schemas/job"),
    ("GET", "/v1/workers"),
]
WRONG = [None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer é"]
OPEN = [
    "/v1/health/live",
    "/v1/health/ready",
    "/metrics",
    "/v1/metrics",
    "/openapi.json",
    "/docs",
    "/static/swagger-ui/swagger-ui-bundle.js",
]


@pytest.mark.parametrize(("method", "path"), PROTECTED)
def test_without_the_key_nothing_is_answered(api: Api, method: str, path: str) -> None:
    for header in WRONG:
        request = api.client.build_request(method, path, headers={b"Authorization": (header or "").encode("latin-1")})
        if header is None:
            del request.headers["authorization"]
        answer = api.client.send(request)
        assert_problem(answer, 401, "UNAUTHENTICATED")
        assert answer.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize("path", OPEN)
def test_open_roads(api: Api, path: str) -> None:
    del api.client.headers["authorization"]
    assert api.client.get(path).status_code == 200


def test_scheme_is_read_without_regard_to_case(api: Api) -> None:
    assert api.client.get("/v1/jobs", headers={"Authorization": f"bearer {KEY}"}).status_code == 200


def test_body_is_not_read_before_the_key(api: Api) -> None:
    """A spec that would be refused, a file that would be staged: the answer is about the key alone."""
    answer = api.submit("{", model=b"junk", headers={"Authorization": "Bearer nothing-of-the-kind"})
    assert_problem(answer, 401, "UNAUTHENTICATED")
    assert api.staged() == []


def add_key(services: Services, owner: str, name: str) -> str:
    key = new_api_key()
    with services.database.write() as session:
        insert_key(session, key, owner, name)
    return key


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_new_key_works_at_once_and_sees_its_owners_jobs_alone(api: Api) -> None:
    job_id = api.job_id()
    other, same = add_key(api.services, "other", "theirs"), add_key(api.services, "default", "ours")
    assert_problem(api.client.get(f"/v1/jobs/{job_id}", headers=bearer(other)), 404, "NOT_FOUND")
    assert_problem(api.client.post(f"/v1/jobs/{job_id}/cancel", headers=bearer(other)), 404, "NOT_FOUND")
    assert api.client.get("/v1/jobs", headers=bearer(other)).json()["items"] == []
    assert api.client.get(f"/v1/jobs/{job_id}", headers=bearer(same)).status_code == 200
    theirs = api.submit(headers=bearer(other)).json()["id"]
    assert_problem(api.client.get(f"/v1/jobs/{theirs}"), 404, "NOT_FOUND")


def test_a_revoked_key_is_refused_once_it_is_forgotten(make_services: MakeServices) -> None:
    services = make_services(key_cache_seconds=0.3)
    with TestClient(create_app(services), headers=HEADERS) as client:
        header = bearer(add_key(services, "other", "theirs"))
        assert client.get("/v1/jobs", headers=header).status_code == 200
        with services.database.write() as session:
            assert revoke_key(session, "theirs") == 1
        revoked = time.monotonic()
        while client.get("/v1/jobs", headers=header).status_code == 200:
            assert time.monotonic() - revoked < 5
            time.sleep(0.02)
        assert time.monotonic() - revoked < 1
        assert client.get("/v1/jobs").status_code == 200, "the configured key is no key of the database"


class CountedReads:
    """How often the database was asked."""

    def __init__(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        read = database.read

        def counted() -> object:
            self.count += 1
            return read()

        monkeypatch.setattr(database, "read", counted)


def test_answers_hold_for_the_cache_time_and_no_longer(
    make_services: MakeServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = make_services()
    assert services.settings.key_cache_seconds == 10
    now = 100.0
    authenticator = Authenticator(services, clock=lambda: now)
    key, stranger = add_key(services, "other", "theirs"), new_api_key()
    assert authenticator.remembered(key) == (False, None)
    assert authenticator.owner_of(key) == "other"
    assert authenticator.owner_of(stranger) is None
    with services.database.write() as session:
        revoke_key(session, "theirs")
    now = 109.9
    assert authenticator.remembered(key) == (True, "other")
    assert authenticator.remembered(stranger) == (True, None)
    now = 110.0
    assert authenticator.remembered(key) == authenticator.remembered(stranger) == (False, None)
    assert authenticator.owner_of(key) is None
    assert authenticator.remembered(key) == (True, None)
    assert authenticator.remembered(KEY) == (True, "default")


def test_requests_with_a_known_key_do_not_ask_the_database(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    header = bearer(add_key(api.services, "other", "theirs"))
    reads = CountedReads(api.services.database, monkeypatch)
    for _ in range(5):
        assert api.client.get("/v1/schemas/job", headers=header).status_code == 200
        api.client.get("/v1/schemas/job", headers=bearer("no-key-of-this-service"))
    assert reads.count == 2
    api.client.get("/v1/schemas/job", headers=bearer("x" * 5000))
    assert reads.count == 2


def test_strangers_fill_no_memory_and_drive_no_owner_out(
    make_services: MakeServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authentication, "REMEMBERED_KEYS", 3)
    services = make_services()
    authenticator = Authenticator(services)
    key = add_key(services, "other", "theirs")
    authenticator.owner_of(key)
    for number in range(10):
        assert authenticator.owner_of(f"stranger-{number}") is None
    assert authenticator.remembered(key) == (True, "other")
    assert [authenticator.remembered(f"stranger-{number}")[0] for number in range(10)] == [False] * 7 + [True] * 3


def test_a_service_of_several_machines_makes_no_key(tmp_path: Path, migrated_file: Path) -> None:
    settings = Settings(
        data_dir=tmp_path, broker_url="redis://127.0.0.1:1/0", database_url=f"sqlite:///{migrated_file}"
    )
    services = build_services(settings)
    assert (services.api_key, ensure_api_key(settings)) == (None, (None, None))
    assert not settings.key_file.exists()
    with TestClient(create_app(services)) as client:
        assert_problem(client.get("/v1/schemas/job", headers=bearer("None")), 401, "UNAUTHENTICATED")
        assert_problem(client.get("/v1/schemas/job", headers=bearer("")), 401, "UNAUTHENTICATED")
    services.database.dispose()
