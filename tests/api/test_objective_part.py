"""A loss of the user's own: how its module comes in, what the job keeps of it, and what is refused."""

import json
from typing import Any

import httpx2
import pytest

from tests.api import archives
from tests.api.conftest import SPEC, Api, assert_problem

LOSS = archives.torchscript(weight=b"a loss")
OWN: dict[str, Any] = {**SPEC, "objective": {"loss": {"module": "objective"}}}


def submit(api: Api, spec: dict[str, Any] = OWN, *, loss: bytes | None = LOSS, **kwargs: Any) -> httpx2.Response:
    files = {"model": ("net.pt", archives.torchscript()), "data": ("d.npz", archives.npz())}
    if loss is not None:
        files["objective"] = ("loss.pt", loss)
    return api.client.post("/v1/jobs", files=files, data={"spec": json.dumps(spec)}, **kwargs)


def named(model_id: str) -> dict[str, Any]:
    return {**SPEC, "objective": {"loss": {"module": model_id}}}


def upload(api: Api, content: bytes = LOSS) -> str:
    return str(api.client.post("/v1/models", content=content).json()["id"])


def test_a_part_becomes_a_model_that_the_job_names(api: Api) -> None:
    answer = submit(api)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert job["objective_model_id"] == upload(api) != job["model_id"]  # the same bytes are the same model
    assert job["requested_spec"]["objective"] == {"loss": {"module": "objective"}}
    resolved = job["spec"]["objective"]
    assert resolved["loss"] == {"module": job["objective_model_id"]}
    assert resolved["distillation"] == 0  # a loss of one's own is taken alone
    claimed = api.claim()
    assert claimed.objective is not None
    assert claimed.objective.id == job["objective_model_id"]
    assert claimed.objective.sha256 == api.client.get(f"/v1/models/{claimed.objective.id}").json()["sha256"]


@pytest.mark.parametrize("as_json", [True, False])
def test_an_uploaded_module_is_named_by_its_id(api: Api, *, as_json: bool) -> None:
    loss_id = upload(api)
    if as_json:
        model_id = upload(api, archives.torchscript())
        dataset_id = api.client.post("/v1/datasets", content=archives.npz()).json()["id"]
        body = {"model_id": model_id, "dataset_id": dataset_id, "spec": named(loss_id)}
        answer = api.client.post("/v1/jobs", json=body)
    else:
        answer = submit(api, named(loss_id), loss=None)
    assert answer.status_code == 202, answer.text
    assert answer.json()["objective_model_id"] == loss_id


@pytest.mark.parametrize(
    ("spec", "loss", "said"),
    [
        (OWN, None, "there is none"),
        (SPEC, LOSS, "the spec does not name"),
        ({**SPEC, "objective": {"loss": {"module": "mine"}}}, LOSS, "id of an uploaded"),
        ({**SPEC, "objective": {"loss": {"module": "objective"}, "metric": "top5"}}, LOSS, "says its metric itself"),
    ],
)
def test_what_does_not_add_up_is_refused(api: Api, spec: dict[str, Any], loss: bytes | None, said: str) -> None:
    problem = assert_problem(submit(api, spec, loss=loss), 422, "SPEC_INVALID")
    assert said in problem["detail"]
    assert problem["errors"][0]["pointer"].startswith("/objective")
    assert api.jobs() == api.staged() == []


def test_a_json_request_has_no_parts(api: Api) -> None:
    body = {"model_id": upload(api, archives.torchscript()), "spec": OWN}
    problem = assert_problem(api.client.post("/v1/jobs", json=body), 422, "SPEC_INVALID")
    assert "POST /v1/models" in problem["detail"]


def test_a_loss_needs_data(api: Api) -> None:
    files = {"model": archives.torchscript(), "objective": LOSS}
    spec = {**OWN, "example_inputs": [{"shape": [1, 4]}]}
    answer = api.client.post("/v1/jobs", files=files, data={"spec": json.dumps(spec)})
    assert "data" in assert_problem(answer, 422, "SPEC_INVALID")["detail"]


def test_another_owners_or_no_module_is_not_found(api: Api) -> None:
    unknown = upload(api)[:-4] + "0000"
    assert_problem(submit(api, named(unknown), loss=None), 404, "NOT_FOUND")


def test_the_archive_is_checked_as_a_models(api: Api) -> None:
    assert_problem(submit(api, loss=b"no zip"), 422, "MODEL_NOT_TORCHSCRIPT")
    assert_problem(submit(api, loss=archives.torchscript(weight=b"x" * 2**21)), 413, "TOO_LARGE")
    assert api.staged() == []


def test_the_module_is_part_of_what_a_key_stands_for(api: Api) -> None:
    headers = {"Idempotency-Key": "k1"}
    first = submit(api, headers=headers).json()
    assert submit(api, headers=headers).json()["id"] == first["id"]
    other = archives.torchscript(weight=b"another loss")
    assert_problem(submit(api, loss=other, headers=headers), 422, "IDEMPOTENCY_MISMATCH")


def test_a_model_that_is_a_loss_stays_while_its_job_waits(api: Api) -> None:
    job = submit(api).json()
    path = f"/v1/models/{job['objective_model_id']}"
    assert_problem(api.client.delete(path), 409, "STATE_CONFLICT")
    assert api.client.post(f"/v1/jobs/{job['id']}/cancel").status_code in {200, 202}
    assert api.client.delete(path).status_code == 204
    problem = assert_problem(api.client.post(f"/v1/jobs/{job['id']}/retry"), 409, "STATE_CONFLICT")
    assert job["objective_model_id"] in problem["detail"]
    assert upload(api) == job["objective_model_id"]
    again = api.client.post(f"/v1/jobs/{job['id']}/retry").json()
    assert again["objective_model_id"] == job["objective_model_id"]
    assert again["spec"] == job["spec"]


def test_a_dry_run_checks_the_module_too(api: Api) -> None:
    assert submit(api, params={"dry_run": "true"}).status_code == 200
    assert_problem(submit(api, loss=None, params={"dry_run": "true"}), 422, "SPEC_INVALID")
    assert api.jobs() == []
