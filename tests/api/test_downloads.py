"""Downloads: ranges, validators, digest, name."""

import base64
import hashlib

import pytest

from tests.api.conftest import Api, assert_problem

CONTENT = bytes(range(256)) * 16
SIZE = len(CONTENT)
ETAG = f'"{hashlib.sha256(CONTENT).hexdigest()}"'


@pytest.fixture
def url(api: Api) -> str:
    return f"/v1/artifacts/{api.artifact(CONTENT, name='résumé small.pt')}/content"


def test_whole_file(api: Api, url: str) -> None:
    answer = api.client.get(url)
    assert answer.status_code == 200
    assert answer.content == CONTENT
    assert answer.headers["etag"] == ETAG
    assert answer.headers["content-length"] == str(SIZE)
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-type"] == "application/octet-stream"
    digest = base64.b64encode(hashlib.sha256(CONTENT).digest()).decode()
    assert answer.headers["repr-digest"] == f"sha-256=:{digest}:"
    expected = "attachment; filename=\"r_sum_ small.pt\"; filename*=UTF-8''r%C3%A9sum%C3%A9%20small.pt"
    assert answer.headers["content-disposition"] == expected


def test_head(api: Api, url: str) -> None:
    answer = api.client.head(url)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == str(SIZE)
    assert answer.headers["etag"] == ETAG


@pytest.mark.parametrize(
    ("header", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-", 0, SIZE),
        ("bytes=10-19", 10, 20),
        ("bytes=4000-", 4000, SIZE),
        ("bytes=4000-99999999", 4000, SIZE),
        ("bytes=-1", SIZE - 1, SIZE),
        ("bytes=-100", SIZE - 100, SIZE),
        ("bytes=-99999999", 0, SIZE),
        ("BYTES=1-2", 1, 3),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
    ],
)
def test_range(api: Api, url: str, header: str, start: int, stop: int) -> None:
    answer = api.client.get(url, headers={"Range": header})
    assert answer.status_code == 206
    assert answer.content == CONTENT[start:stop]
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{SIZE}"
    assert answer.headers["content-length"] == str(stop - start)
    assert answer.headers["etag"] == ETAG
    head = api.client.head(url, headers={"Range": header})
    assert (head.status_code, head.content) == (206, b"")


@pytest.mark.parametrize("header", [f"bytes={SIZE}-", "bytes=99999999-", "bytes=-0", f"bytes={SIZE}-{SIZE + 5}"])
def test_range_outside(api: Api, url: str, header: str) -> None:
    answer = api.client.get(url, headers={"Range": header})
    assert_problem(answer, 416, "RANGE_NOT_SATISFIABLE")
    assert answer.headers["content-range"] == f"bytes */{SIZE}"


@pytest.mark.parametrize(
    "header", ["bytes=5-2", "bytes=", "bytes=-", "bytes=a-b", "lines=1-2", "bytes=0-1,5-6", "bytes=1", "", "bytes=٣-"]
)
def test_range_that_is_ignored(api: Api, url: str, header: str) -> None:
    answer = api.client.get(url, headers={b"Range": header.encode()})
    assert (answer.status_code, answer.content) == (200, CONTENT)


@pytest.mark.parametrize("header", [ETAG, f"W/{ETAG}", f'"other", {ETAG}', "*"])
def test_not_modified(api: Api, url: str, header: str) -> None:
    answer = api.client.get(url, headers={"If-None-Match": header})
    assert (answer.status_code, answer.content) == (304, b"")
    assert answer.headers["etag"] == ETAG


def test_modified(api: Api, url: str) -> None:
    assert api.client.get(url, headers={"If-None-Match": '"other"'}).status_code == 200


def test_if_range(api: Api, url: str) -> None:
    same = api.client.get(url, headers={"Range": "bytes=1-2", "If-Range": ETAG})
    assert (same.status_code, same.content) == (206, CONTENT[1:3])
    for other in ['"other"', f"W/{ETAG}", "Wed, 21 Oct 2026 07:28:00 GMT"]:
        answer = api.client.get(url, headers={"Range": "bytes=1-2", "If-Range": other})
        assert (answer.status_code, answer.content) == (200, CONTENT)


def test_empty_file(api: Api) -> None:
    url = f"/v1/artifacts/{api.artifact(b'')}/content"
    assert api.client.get(url).status_code == 200
    assert api.client.get(url, headers={"Range": "bytes=0-"}).status_code == 416


def test_listed_artifact_is_the_downloaded_one(api: Api) -> None:
    artifact_id = api.artifact(CONTENT)
    (job,) = api.jobs()
    (listed,) = api.client.get(f"/v1/jobs/{job['id']}/artifacts").json()["items"]
    expected = {
        "id": artifact_id,
        "name": "small.pt",
        "format": "torchscript",
        "bytes": SIZE,
        "sha256": ETAG.strip('"'),
    }
    assert listed == expected


def test_bytes_that_are_gone_are_an_error_of_the_service(api: Api) -> None:
    artifact_id = api.artifact(CONTENT)
    for path in (api.services.settings.data_dir / "blobs" / "sha256").rglob("*"):
        if path.is_file():
            path.unlink()
    assert_problem(api.client.get(f"/v1/artifacts/{artifact_id}/content"), 500, "INTERNAL")


def test_report(api: Api) -> None:
    report = b'{"version": 1}'
    api.artifact(report, name="report.json", format="report")
    (job,) = api.jobs()
    answer = api.client.get(f"/v1/jobs/{job['id']}/report")
    assert (answer.status_code, answer.content) == (200, report)
    assert answer.headers["content-type"] == "application/json"
    assert "content-disposition" not in answer.headers
    head = api.client.head(f"/v1/jobs/{job['id']}/report")
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", answer.headers["etag"])
