"""DELETE: what has ended goes, what is needed is refused with what to do."""

import pytest

from service.contract.resources import ResultSummary
from service.store.attempts import finish_canceled, finish_succeeded
from service.store.tables import Artifact
from tests.api import archives
from tests.api.conftest import SPEC, Api, assert_problem

NOBODY = "00000000000000000000000000"


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_a_job_is_deleted_when_it_has_ended(api: Api, prefix: str) -> None:
    job_id = api.job_id()
    problem = assert_problem(api.client.delete(f"{prefix}/jobs/{job_id}"), 409, "STATE_CONFLICT")
    assert problem["detail"].endswith(f"job {job_id} is queued: cancel it first, or wait for its end")
    api.client.post(f"/v1/jobs/{job_id}/cancel")
    answer = api.client.delete(f"{prefix}/jobs/{job_id}")
    assert (answer.status_code, answer.content) == (204, b"")
    for path in (f"/v1/jobs/{job_id}", f"/v1/jobs/{job_id}/events", f"/v1/jobs/{job_id}/layers"):
        assert_problem(api.client.get(path), 404, "NOT_FOUND")
    assert_problem(api.client.delete(f"/v1/jobs/{job_id}"), 404, "NOT_FOUND")
    assert api.jobs() == []


@pytest.mark.parametrize(("kind", "field"), [("models", "model_id"), ("datasets", "dataset_id")])
def test_files_are_deleted_when_no_job_needs_them(api: Api, kind: str, field: str) -> None:
    job_id = api.job_id()
    file_id = api.client.get(f"/v1/jobs/{job_id}").json()[field]
    problem = assert_problem(api.client.delete(f"/v1/{kind}/{file_id}"), 409, "STATE_CONFLICT")
    assert f"job {job_id} is queued: cancel it first" in problem["detail"]
    api.client.post(f"/v1/jobs/{job_id}/cancel")
    assert api.client.delete(f"/v1/{kind}/{file_id}").status_code == 204
    assert_problem(api.client.get(f"/v1/{kind}/{file_id}"), 404, "NOT_FOUND")
    assert_problem(api.client.delete(f"/v1/{kind}/{file_id}"), 404, "NOT_FOUND")
    assert api.client.get(f"/v1/{kind}").json()["items"] == []
    assert api.client.get(f"/v1/jobs/{job_id}").json()[field] == file_id


def test_a_submission_that_names_a_deleted_file_is_refused(api: Api) -> None:
    model = api.client.post("/v1/models", content=archives.torchscript()).json()["id"]
    dataset = api.client.post("/v1/datasets", content=archives.npz()).json()["id"]
    body = {"model_id": model, "dataset_id": dataset, "spec": SPEC}
    api.client.delete(f"/v1/datasets/{dataset}")
    assert_problem(api.client.post("/v1/jobs", json=body), 404, "NOT_FOUND")
    assert api.client.post("/v1/datasets", content=archives.npz()).json()["id"] == dataset  # until a sweep
    api.client.delete(f"/v1/models/{model}")
    assert_problem(api.client.post("/v1/jobs", json=body), 404, "NOT_FOUND")


def test_a_submission_that_sends_a_deleted_file_brings_it_back(api: Api) -> None:
    first = api.submit().json()
    api.client.post(f"/v1/jobs/{first['id']}/cancel")
    api.client.delete(f"/v1/models/{first['model_id']}")
    again = api.submit().json()
    assert again["model_id"] == first["model_id"]
    assert api.client.get(f"/v1/models/{first['model_id']}").status_code == 200


def test_an_artifact_is_deleted_and_its_job_stays(api: Api) -> None:
    artifact_id = api.artifact(b"small")
    path = f"/v1/artifacts/{artifact_id}"
    with api.services.database.read() as session:
        job_id = session.get_one(Artifact, artifact_id).job_id
    assert_problem(api.client.delete(path), 409, "STATE_CONFLICT")
    end_running(api, job_id)
    assert api.client.delete(path).status_code == 204
    assert_problem(api.client.get(f"{path}/content"), 404, "NOT_FOUND")
    assert api.client.get(f"/v1/jobs/{job_id}/artifacts").json()["items"] == []


@pytest.mark.parametrize("path", [f"jobs/job_{NOBODY}", f"models/mdl_{NOBODY}", f"artifacts/art_{NOBODY}", "jobs/x"])
def test_what_is_not_there(api: Api, path: str) -> None:
    assert_problem(api.client.delete(f"/v1/{path}"), 404, "NOT_FOUND")


def test_deleting_needs_the_key(api: Api) -> None:
    answer = api.client.delete(f"/v1/jobs/{api.job_id()}", headers={"Authorization": ""})
    assert_problem(answer, 401, "UNAUTHENTICATED")


def end_running(api: Api, job_id: str) -> None:
    with api.services.database.write() as session:
        assert finish_canceled(session, job_id, 1)


def test_a_report_that_was_deleted_is_said_to_be(api: Api) -> None:
    report_id = api.artifact(b"{}", name="report.json", format="report")
    job_id = api.jobs()[0]["id"]
    result = ResultSummary(params_fraction=0.4, macs_fraction=0.3, file_bytes_fraction=0.5)
    with api.services.database.write() as session:
        assert finish_succeeded(session, job_id, 1, result)
    assert api.client.get(f"/v1/jobs/{job_id}/report").status_code == 200
    api.client.delete(f"/v1/artifacts/{report_id}")
    problem = assert_problem(api.client.get(f"/v1/jobs/{job_id}/report"), 404, "NOT_FOUND")
    assert problem["detail"] == f"the report of job {job_id} was deleted"
