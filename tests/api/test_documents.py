"""Capabilities, the spec's schema, OpenAPI, the docs page: served, whole, and as written in docs/."""

import re
import subprocess
import sys

from service.contract.errors import ErrorCode
from service.contract.ids import WORKER, new_id
from service.contract.plan import REASON_MEANINGS, ReasonCode
from service.openapi import main, pages
from service.store.workers import register_worker
from tests.api.conftest import Api


def test_capabilities(api: Api) -> None:
    found = api.client.get("/v1/capabilities").json()
    assert found["methods"] == ["learning_compression"]
    assert found["terms"][0]["type"] == "low_rank"
    assert {"conv2d", "linear", "embedding", "parameter"} <= set(found["layer_kinds"])
    assert found["outputs"] == ["torchscript"]
    assert found["data_formats"] == ["npz", "safetensors", "webdataset"]
    assert "cpu" in found["devices"]
    assert set(found["reason_codes"]) == set(ReasonCode)
    assert set(found["error_codes"]) == set(ErrorCode)
    assert found["limits"]["max_model_bytes"] == 1024 * 1024
    assert found["spec_schema"] == api.client.get("/v1/schemas/job").json()


def test_devices_are_those_that_workers_have(api: Api) -> None:
    def register(devices: dict[str, list[int]]) -> list[str]:
        with api.services.database.write() as session:
            register_worker(session, new_id(WORKER), host="h", pid=1, queues=["cpu"], slots=1, devices=devices)
        found: list[str] = api.client.get("/v1/capabilities").json()["devices"]
        return found

    assert register({"cuda": []}) == ["cpu"]
    assert register({"cuda": [0]}) == ["cpu", "cuda"]


def test_spec_schema_speaks_as_users_write(api: Api) -> None:
    schema = api.client.get("/v1/schemas/job").json()
    assert "lambda" in schema["$defs"]["LearningCompressionSpec"]["properties"]
    assert schema["additionalProperties"] is False


def test_every_reason_has_a_meaning() -> None:
    assert set(REASON_MEANINGS) == set(ReasonCode)


def test_generated_pages_are_up_to_date() -> None:
    assert main(["--check"]) == 0


def test_openapi_lists_the_versioned_roads_only(api: Api) -> None:
    document = api.client.get("/openapi.json").json()
    paths = set(document["paths"])
    assert all(path.startswith("/v1/") for path in paths)
    assert {"/v1/jobs", "/v1/jobs/{id}/cancel", "/v1/artifacts/{id}/content", "/v1/health/ready"} <= paths
    submit = document["paths"]["/v1/jobs"]["post"]
    assert set(submit["requestBody"]["content"]) == {"multipart/form-data", "application/json"}
    assert submit["security"]
    assert "openapi.json" in pages()


def test_docs_page_loads_from_this_service_alone(api: Api) -> None:
    page = api.client.get("/")  # leads to /docs
    assert page.status_code == 200
    assert page.url.path == "/docs"
    assert "script-src 'self'" in page.headers["content-security-policy"]
    sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(sources) == 4
    for source in sources:
        assert not source.startswith(("http", "//"))
        assert api.client.get(f"/{source}").status_code == 200
    assert "<script>" not in page.text


def test_service_imports_neither_torch_nor_worker() -> None:
    code = "import sys, service.app; sys.exit(any(n.split('.')[0] in {'torch', 'worker'} for n in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
