"""What every answer carries, and requests that fit nowhere."""

import asyncio
from typing import Any

import pytest
import structlog

from service.app import create_app
from tests.api import archives
from tests.api.conftest import KEY, Api, MakeServices, assert_problem


def test_request_id_of_the_client_is_kept(api: Api) -> None:
    answer = api.client.get("/v1/jobs/nothing", headers={"X-Request-Id": "trace-1.2_3"})
    assert answer.headers["x-request-id"] == "trace-1.2_3"
    assert answer.json()["request_id"] == "trace-1.2_3"


@pytest.mark.parametrize("sent", ["", "a b", "x" * 65, "é", "a\tb", "<script>"])
def test_request_id_that_cannot_be_kept_is_replaced(api: Api, sent: str) -> None:
    answer = api.client.get("/v1/health/live", headers={b"X-Request-Id": sent.encode()})
    assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("path", ["/v1/health/live", "/nothing", "/docs", "/openapi.json", "/v1/jobs"])
def test_security_headers(api: Api, path: str) -> None:
    headers = api.client.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert "default-src 'none'" in headers["content-security-policy"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/v1/jobs", "GET, POST"),
        ("PUT", "/v1/models", "GET, POST"),
        ("GET", "/v1/jobs/job_x/cancel", "POST"),
        ("POST", "/v1/capabilities", "GET"),
        ("POST", "/v1/artifacts/art_x/content", "GET, HEAD"),
        ("POST", "/static/docs.js", "GET, HEAD"),
    ],
)
def test_methods(api: Api, method: str, path: str, allowed: str) -> None:
    answer = api.client.request(method, path)
    assert_problem(answer, 405, "METHOD_NOT_ALLOWED")
    assert answer.headers["allow"] == allowed


@pytest.mark.parametrize("path", ["/v2/jobs", "/v1", "/v1/jobs/a/b/c/d", "/%00", "/v1/artifacts/x/y", "/models"])
def test_paths(api: Api, path: str) -> None:
    assert_problem(api.client.get(path), 404, "NOT_FOUND")


def test_body_where_none_belongs(api: Api) -> None:
    path = f"/v1/jobs/{api.job_id()}/cancel"
    assert_problem(api.client.post(path, content=bytes(2 * 1024**2)), 413, "TOO_LARGE")
    assert api.client.post(path, content=b"ignored").status_code == 202


def test_log_names_the_request_and_never_the_key(api: Api, logged: list[Any]) -> None:
    api.client.get("/v1/jobs")
    line = next(line for line in logged if line["event"] == "request")
    assert (line["method"], line["path"], line["status"]) == ("GET", "/v1/jobs", 200)
    assert KEY not in str(logged)


class Connection:
    """One request over bare ASGI, whose client sends chunk by chunk and may go away."""

    def __init__(self, path: str, chunks: list[bytes | None], headers: dict[str, str] | None = None) -> None:
        self.chunks = list(chunks)
        self.sent: list[dict[str, Any]] = []
        raw = {"authorization": f"Bearer {KEY}", **(headers or {})}
        self.scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in raw.items()],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "state": {},
        }  # fmt: skip

    async def receive(self) -> dict[str, Any]:
        if not self.chunks:
            await asyncio.sleep(3600)
        chunk = self.chunks.pop(0)
        if chunk is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": chunk, "more_body": True}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    def run(self, app: Any) -> int | None:
        asyncio.run(asyncio.wait_for(app(self.scope, self.receive, self.send), 20))
        return self.sent[0]["status"] if self.sent else None


@pytest.mark.parametrize("path", ["/v1/models", "/v1/jobs"])
def test_client_that_goes_away_leaves_nothing(api: Api, path: str) -> None:
    content = archives.torchscript()
    headers = {}
    if path == "/v1/jobs":
        headers = {"content-type": "multipart/form-data; boundary=b", "idempotency-key": "k"}
        content = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + content
    connection = Connection(path, [content[:100], content[100:], None], headers)
    assert connection.run(api.client.app) is None
    assert api.staged() == []
    assert api.jobs() == []
    assert api.submit(headers={"Idempotency-Key": "k"}).status_code == 202


def test_client_that_stalls_is_refused(make_services: MakeServices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.api.limits.LINGER_SECONDS", 0.1)
    services = make_services(upload_idle_seconds=0.1)
    assert Connection("/v1/models", [b"PK"], {"content-length": "100"}).run(create_app(services)) == 422


def test_refused_sender_is_listened_to_for_a_while(api: Api) -> None:
    """The answer goes out first, the rest of the body is dropped, and only then the connection may be closed."""
    body = [bytes(1000)] * 5
    connection = Connection("/v1/models", [*body, None], {"authorization": "Bearer wrong", "content-length": "5000"})
    assert connection.run(api.client.app) == 401
    assert connection.chunks == []
    assert [message.get("more_body") for message in connection.sent[1:]] == [True, False]


def test_listening_ends(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.api.limits.LINGER_SECONDS", 0.1)
    connection = Connection("/v1/models", [b"x"], {"authorization": "Bearer wrong", "content-length": "5000"})
    assert connection.run(api.client.app) == 401


def test_a_job_can_be_traced_from_its_request(api: Api) -> None:
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        answer = api.submit(headers={"X-Request-Id": "trace-7"})
    (accepted,) = (line for line in lines if line["event"] == "job_accepted")
    assert (accepted["job_id"], accepted["request_id"]) == (answer.json()["id"], "trace-7")
    (line,) = (line for line in lines if line["event"] == "request")
    assert (line["request_id"], line["route"], line["owner"]) == ("trace-7", "/v1/jobs", "default")
    assert line["duration_ms"] > 0
