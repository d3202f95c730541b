import hashlib
from pathlib import Path

import pytest
from stub_service import CONTENT, KEY, StubService

from service.client import Client, DownloadDamagedError, ServiceProblem, ServiceUnavailable, WaitTimeout
from service.contract import ids
from service.contract.errors import ErrorCode
from service.contract.states import JobState

SPEC = {"budget": {"max_macs_fraction": 0.3}}


def test_submit_streams_both_files_and_makes_its_own_key(client: Client, stub: StubService, model: Path) -> None:
    job = client.submit(SPEC, model=model, data=model, name="try")
    sent = stub.submissions[0]
    assert job.id == stub.job_id
    assert sent["model"] == sent["data"] == model.read_bytes()
    assert sent["spec"] == SPEC
    assert sent["name"] == "try"
    assert len(sent["key"]) >= 16


def test_submit_names_what_is_already_uploaded(client: Client, stub: StubService) -> None:
    model_id, dataset_id = ids.new_id(ids.MODEL), ids.new_id(ids.DATASET)
    client.submit(SPEC, model=model_id, data=dataset_id, idempotency_key="mine")
    sent = stub.submissions[0]
    assert (sent["model_id"], sent["dataset_id"], sent["key"]) == (model_id, dataset_id, "mine")


def test_submit_uploads_the_model_when_the_data_is_an_id(client: Client, stub: StubService, model: Path) -> None:
    client.submit(SPEC, model=model, data=ids.new_id(ids.DATASET))
    assert ids.is_id(stub.submissions[0]["model_id"], ids.MODEL)


def test_submit_brings_a_loss_along_and_names_it(client: Client, stub: StubService, model: Path) -> None:
    client.submit({**SPEC, "objective": {"distillation": 0.1}}, model=model, data=model, objective=model)
    sent = stub.submissions[0]
    assert sent["objective"] == model.read_bytes()
    assert sent["spec"] == {**SPEC, "objective": {"distillation": 0.1, "loss": {"module": "objective"}}}


def test_submit_names_an_uploaded_loss(client: Client, stub: StubService, model: Path) -> None:
    loss_id = ids.new_id(ids.MODEL)
    client.submit(SPEC, model=model, data=model, objective=loss_id)
    client.submit(SPEC, model=ids.new_id(ids.MODEL), data=ids.new_id(ids.DATASET), objective=model)
    first, second = stub.submissions
    assert first["spec"]["objective"] == {"loss": {"module": loss_id}}
    assert "objective" not in first
    assert ids.is_id(second["spec"]["objective"]["loss"]["module"], ids.MODEL)  # uploaded on the way


def test_submit_is_tried_again_with_the_same_key(client: Client, stub: StubService, model: Path) -> None:
    stub.fail_first = 2
    client.submit(SPEC, model=model)
    keys = {request.headers["Idempotency-Key"] for request in stub.requests}
    assert len(stub.requests) == 3
    assert len(keys) == 1
    assert stub.submissions[0]["model"] == model.read_bytes()


def test_upload_sends_the_whole_file_and_its_name(client: Client, model: Path) -> None:
    resource = client.upload_model(model, name="net é.pt")
    assert resource.sha256 == hashlib.sha256(model.read_bytes()).hexdigest()
    assert resource.name == "attachment; filename*=UTF-8''net%20%C3%A9.pt"


def test_a_refusal_carries_the_problem(stub: StubService) -> None:
    with Client(stub.url, "another key of enough length") as client, pytest.raises(ServiceProblem) as refused:
        client.job(stub.job_id)
    assert refused.value.problem.code is ErrorCode.UNAUTHENTICATED
    assert refused.value.problem.request_id == "req_test"


def test_nobody_there() -> None:
    with (
        Client("http://127.0.0.1:9", KEY, attempts=2) as client,
        pytest.raises(ServiceUnavailable, match="no service answers"),
    ):
        client.job("x")


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://somewhere", "http://"])
def test_an_address_that_cannot_be_one_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        Client(url)


def test_lists_follow_their_cursors(client: Client) -> None:
    assert len(list(client.jobs(state="running"))) == 2
    assert [event.id for event in client.events("job")] == [1, 2, 3, 4, 5]
    assert [event.id for event in client.events("job", after=3)] == [4, 5]


def test_download_appears_whole(client: Client, stub: StubService, tmp_path: Path) -> None:
    target = tmp_path / "small.pt"
    artifact = client.artifacts(stub.job_id)[0]
    assert client.download(artifact, target) == artifact.sha256
    assert target.read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []


def test_download_goes_on_where_it_broke(client: Client, stub: StubService, tmp_path: Path) -> None:
    stub.break_download_after = 300_000
    client.download(client.artifacts(stub.job_id)[0], tmp_path / "small.pt")
    assert (tmp_path / "small.pt").read_bytes() == CONTENT
    assert stub.ranges == [None, "bytes=300000-"]


def test_damaged_download_leaves_no_file(client: Client, stub: StubService, tmp_path: Path) -> None:
    stub.damage = True
    with pytest.raises(DownloadDamagedError, match="SHA-256"):
        client.download(client.artifacts(stub.job_id)[0], tmp_path / "small.pt")
    assert list(tmp_path.glob("*small*")) == []


def test_wait_tells_every_update(client: Client, stub: StubService) -> None:
    seen: list[int] = []
    job = client.wait(stub.job_id, on_update=lambda job: seen.append(job.progress.step))
    assert job.state is JobState.SUCCEEDED
    assert seen == [1, 2, 3]


def test_wait_gives_up_in_time(client: Client, stub: StubService) -> None:
    stub.steps = -1
    with pytest.raises(WaitTimeout, match="goes on"):
        client.wait(stub.job_id, timeout_seconds=0.3)


def test_an_unready_service_says_so(client: Client) -> None:
    assert client.health().status == "unavailable"
