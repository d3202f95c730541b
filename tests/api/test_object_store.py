"""The service with its files in a bucket: uploads, jobs, downloads, and a store that goes away and comes back."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.blobs.store import BlobStore
from tests.api import archives
from tests.api.conftest import HEADERS, SPEC, Api, MakeServices, assert_problem
from tests.s3_server import S3Server

CONTENT = bytes(range(256)) * 16


@pytest.fixture
def api(make_services: MakeServices, s3_url: str) -> Iterator[Api]:
    services = make_services(blob_url=s3_url)
    staging = services.settings.data_dir / "staging"
    services = replace(services, blobs=BlobStore(s3_url, staging_dir=staging, away_seconds=0.6))
    with TestClient(create_app(services), headers=HEADERS, raise_server_exceptions=True) as client:
        yield Api(services, client)


def staged(api: Api) -> list[str]:
    return [path.name for path in (api.services.settings.data_dir / "staging").iterdir()]


def test_a_job_is_submitted_and_its_files_come_out_again(api: Api) -> None:
    model = archives.torchscript()
    uploaded = api.client.post("/v1/models?name=net.pt", content=model)
    assert uploaded.status_code == 201
    data = api.client.post("/v1/datasets", content=archives.npz()).json()
    body = {"model_id": uploaded.json()["id"], "dataset_id": data["id"], "spec": SPEC}
    assert api.client.post("/v1/jobs", json=body).status_code == 202
    claimed = api.claim()
    assert claimed.model.sha256 == hashlib.sha256(model).hexdigest()
    assert b"".join(api.services.blobs.open_range(claimed.model.blob_key)) == model
    assert staged(api) == []


def test_a_job_without_data_is_told_the_inputs_it_needs(api: Api) -> None:
    answer = api.submit(SPEC, data=None)
    assert_problem(answer, 422, "EXAMPLE_INPUTS_MISSING")
    uploaded = api.client.post("/v1/models", content=archives.torchscript()).json()
    answer = api.client.post("/v1/jobs", json={"model_id": uploaded["id"], "spec": SPEC})
    assert_problem(answer, 422, "EXAMPLE_INPUTS_MISSING")


def test_downloads_know_ranges_and_validators(api: Api) -> None:
    url = f"/v1/artifacts/{api.artifact(CONTENT)}/content"
    whole = api.client.get(url)
    etag = f'"{hashlib.sha256(CONTENT).hexdigest()}"'
    assert (whole.status_code, whole.content, whole.headers["etag"]) == (200, CONTENT, etag)
    part = api.client.get(url, headers={"Range": "bytes=100-299", "If-Range": etag})
    assert (part.status_code, part.content) == (206, CONTENT[100:300])
    assert part.headers["content-range"] == f"bytes 100-299/{len(CONTENT)}"
    assert api.client.get(url, headers={"If-None-Match": etag}).status_code == 304
    assert api.client.head(url).headers["content-length"] == str(len(CONTENT))


def test_while_the_store_is_away_nothing_is_accepted_and_then_everything_is(api: Api, s3_server: S3Server) -> None:
    url = f"/v1/artifacts/{api.artifact(CONTENT)}/content"
    jobs = api.jobs()
    headers = {"Idempotency-Key": "the-same-request"}
    with s3_server.away():
        for answer in (
            api.client.get(url),
            api.client.post("/v1/models", content=archives.torchscript()),
            api.submit(headers=headers),
        ):
            problem = assert_problem(answer, 503, "UNAVAILABLE")
            assert "store of files" in problem["detail"]
            assert int(answer.headers["retry-after"]) > 0
        assert api.client.get("/v1/jobs").status_code == 200
        assert api.client.get("/v1/health/ready").json()["checks"]["blobs"] != "ok"
    assert (api.jobs(), staged(api)) == (jobs, [])
    assert api.submit(headers=headers).status_code == 202
    assert api.client.get(url).content == CONTENT
    assert api.client.get("/v1/health/ready").json()["checks"]["blobs"] == "ok"


def test_a_full_store_is_told_as_such(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("service.blobs.store.obstore.put", full)
    answer = api.client.post("/v1/models", content=archives.torchscript())
    assert_problem(answer, 507, "STORAGE_FULL")
    assert staged(api) == []
