"""Every road but health, OpenAPI and the docs page asks for the key, before it reads a body."""

import pytest

from tests.api.conftest import KEY, Api, assert_problem

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
]
WRONG = [None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer é"]
OPEN = ["/v1/health/live", "/v1/health/ready", "/openapi.json", "/docs", "/static/swagger-ui/swagger-ui-bundle.js"]


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
