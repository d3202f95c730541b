"""`/metrics`: what Prometheus reads, with the database and without it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Never

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from service.app import create_app
from service.contract.errors import ErrorCode, ProblemError
from service.contract.ids import WORKER, new_id
from service.jobs.looks import Look
from service.store.attempts import finish_failed
from service.store.workers import register_worker
from tests.api.conftest import HEADERS, Api, MakeServices

NAMES = {
    "rankpress_attempts_ended",
    "rankpress_bell_failures",
    "rankpress_build_info",
    "rankpress_checkpoint_age_seconds",
    "rankpress_database_up",
    "rankpress_fenced_writes_refused",
    "rankpress_http_request_duration_seconds",
    "rankpress_jobs",
    "rankpress_jobs_ended",
    "rankpress_jobs_submitted",
    "rankpress_lease_expiries",
    "rankpress_phase_duration_seconds",
    "rankpress_queue_depth",
    "rankpress_queue_oldest_age_seconds",
    "rankpress_running_jobs",
    "rankpress_worker_slots",
    "rankpress_worker_slots_busy",
    "rankpress_workers",
}


def scrape(client: TestClient, path: str = "/metrics") -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels."""
    answer = client.get(path)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


@pytest.mark.parametrize("path", ["/metrics", "/v1/metrics"])
def test_every_metric_is_there_from_the_start_and_no_key_is_asked(api: Api, path: str) -> None:
    api.client.get("/v1/jobs")
    del api.client.headers["authorization"]
    text = api.client.get(path).text
    families = {family.name for family in text_string_to_metric_families(text)}
    assert {name for name in families if name.startswith("rankpress_") and not name.endswith("_created")} == NAMES
    assert "process_resident_memory_bytes" in families
    found = scrape(api.client, path)
    assert found["rankpress_attempts_ended_total", "lost"] == 0
    assert found["rankpress_queue_depth", "gpu", "backoff"] == 0


def test_jobs_are_counted_from_submission_to_end(api: Api) -> None:
    for _ in range(3):
        api.job_id()
    time.sleep(0.05)
    found = scrape(api.client)
    assert found["rankpress_jobs_submitted_total",] == 3
    assert found["rankpress_queue_depth", "cpu", "claimable"] == 3
    assert 0.05 <= found["rankpress_queue_oldest_age_seconds", "cpu"] < 60
    assert found["rankpress_jobs", "queued"] == 3
    first, second = api.claim(), api.claim()
    with api.services.database.write() as session:
        register_worker(session, new_id(WORKER), host="h", pid=1, queues=["gpu", "cpu"], slots=4)
        problem = ProblemError(ErrorCode.INTERNAL, "junk").problem()
        assert finish_failed(session, first.job_id, first.epoch, problem)
    time.sleep(0.05)
    found = scrape(api.client)
    assert found["rankpress_queue_depth", "cpu", "claimable"] == 1
    assert found["rankpress_running_jobs", "cpu"] == 1
    assert 0.05 <= found["rankpress_checkpoint_age_seconds", "cpu"] < 60
    assert found["rankpress_jobs_ended_total", "failed"] == 1
    assert found["rankpress_attempts_ended_total", "failed"] == 1
    assert found["rankpress_workers", "gpu"] == found["rankpress_workers", "cpu"] == 1
    assert found["rankpress_worker_slots", "gpu"] == 4
    assert second.job_id != first.job_id


def test_requests_are_counted_by_template_and_never_by_path(api: Api) -> None:
    job_id = api.job_id()
    for _ in range(2):
        api.client.get(f"/v1/jobs/{job_id}")
    api.client.get(f"/jobs/{job_id}")
    api.client.get("/v1/jobs/nothing")
    api.client.get("/some/path/of/a/scanner")
    api.client.request("BREW", "/v1/jobs")
    found = scrape(api.client)
    count = "rankpress_http_request_duration_seconds_count"
    assert found[count, "GET", "/v1/jobs/{id}", "200"] == 2
    assert found[count, "GET", "/jobs/{id}", "200"] == 1
    assert found[count, "GET", "/v1/jobs/{id}", "404"] == 1
    assert found[count, "POST", "/v1/jobs", "202"] == 1
    assert found[count, "GET", "unmatched", "404"] == 1
    assert found[count, "other", "/v1/jobs", "405"] == 1
    assert not any(job_id in label or "scanner" in label for key in found for label in key)


def test_without_the_database_the_process_is_still_scraped(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def away() -> Iterator[Never]:
        raise OperationalError("SELECT 1", {}, Exception("connection refused"))
        yield

    monkeypatch.setattr(api.services.database, "read", away)
    api.client.get("/v1/health/live")
    found = scrape(api.client)
    assert found["rankpress_database_up",] == 0
    assert found["rankpress_http_request_duration_seconds_count", "GET", "/v1/health/live", "200"] == 1
    assert ("rankpress_jobs_submitted_total",) not in found
    monkeypatch.undo()
    assert scrape(api.client)["rankpress_database_up",] == 1


def test_a_database_that_hangs_is_not_waited_for(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    @contextmanager
    def hang() -> Iterator[Never]:
        answered.wait(20)
        raise OperationalError("SELECT 1", {}, Exception("connection reset"))
        yield

    monkeypatch.setattr(Look.answer, "__defaults__", (0.2,))
    monkeypatch.setattr(api.services.database, "read", hang)
    for _ in range(3):
        began = time.monotonic()
        assert scrape(api.client)["rankpress_database_up",] == 0
        assert time.monotonic() - began < 2
    answered.set()


def test_bells_that_failed(make_services: MakeServices) -> None:
    services = make_services(broker_url="redis://127.0.0.1:1/0")
    with TestClient(create_app(services), headers=HEADERS) as client:
        Api(services, client).job_id()
        deadline = time.monotonic() + 10
        while scrape(client)["rankpress_bell_failures_total",] < 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_each_application_counts_its_own(api: Api) -> None:
    api.client.get("/docs")
    with TestClient(create_app(api.services), headers=HEADERS) as other:
        docs = ("rankpress_http_request_duration_seconds_count", "GET", "/docs", "200")
        assert docs not in scrape(other)
    assert scrape(api.client)[docs] == 1


def test_openmetrics_is_spoken_to_who_asks_for_it(api: Api) -> None:
    answer = api.client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_lines_of_machines_are_quiet(api: Api, logged: list[dict[str, Any]]) -> None:
    for path in ("/metrics", "/v1/metrics", "/v1/health/live", "/v1/health/ready", "/v1/jobs"):
        api.client.get(path)
    levels = {line["path"]: line["log_level"] for line in logged if line["event"] == "request"}
    assert levels.pop("/v1/jobs") == "info"
    assert set(levels.values()) == {"debug"}
