"""`rankpress retry` and `rankpress delete`."""

import json

import httpx2
import pytest
from stub_service import StubService

from service.cli.command import run
from service.cli.exits import ExitCode
from service.client import Client
from service.contract import ids
from service.contract.states import JobState

Captured = pytest.CaptureFixture[str]


def test_retry_prints_the_new_job(stub: StubService, capsys: Captured) -> None:
    assert run(["retry", "job_old"]) == ExitCode.DONE
    assert capsys.readouterr().out.strip() == stub.job_id
    (request,) = stub.requests
    assert request.url.path == "/v1/jobs/job_old/retry"
    assert dict(request.query_params) == {}
    assert len(request.headers["Idempotency-Key"]) >= 16
    assert run(["retry", "job_old", "--from-start", "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out)["id"] == stub.job_id
    assert dict(stub.requests[-1].query_params) == {"from": "start"}


def test_retry_can_wait_for_the_end(stub: StubService, capsys: Captured) -> None:
    assert run(["retry", "job_old", "--wait"]) == ExitCode.DONE
    shown = capsys.readouterr()
    assert "channel rank 2 + spatial rank 1" in shown.out
    assert f"rankpress fetch {stub.job_id}" in shown.err
    stub.polls, stub.end = 0, JobState.FAILED
    assert run(["retry", "job_old", "--wait"]) == ExitCode.FAILED
    stub.polls, stub.steps = 0, -1
    assert run(["retry", "job_old", "--wait", "--timeout", "0.1"]) == ExitCode.TIMEOUT


def test_delete_takes_any_kind_of_id(stub: StubService, capsys: Captured) -> None:
    assert run(["delete", stub.job_id]) == ExitCode.DONE
    assert stub.requests[-1].url.path == f"/v1/jobs/{stub.job_id}"
    assert stub.job_id in capsys.readouterr().err
    assert run(["delete", stub.job_id, "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out) == {"deleted": [stub.job_id]}
    for prefix, collection in ((ids.MODEL, "models"), (ids.DATASET, "datasets"), (ids.ARTIFACT, "artifacts")):
        id_ = ids.new_id(prefix)
        assert run(["delete", id_]) == ExitCode.USAGE
        assert stub.requests[-1].url.path == f"/v1/{collection}/{id_}"
        assert "STATE_CONFLICT: it is in use: cancel job_x first" in capsys.readouterr().err


def test_delete_refuses_other_ids(stub: StubService, client: Client, capsys: Captured) -> None:
    assert run(["delete", "wrk_1"]) == ExitCode.USAGE
    assert "expected the id of a job, model, dataset or artifact; found 'wrk_1'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected the id"):
        client.delete("../jobs")
    assert stub.requests == []


def test_a_deletion_whose_answer_was_lost_is_done() -> None:
    answers = iter([httpx2.Response(502), httpx2.Response(404, json={})])
    with Client("http://127.0.0.1:9", http_transport=httpx2.MockTransport(lambda _: next(answers))) as client:
        client.delete(ids.new_id(ids.JOB))
    assert next(answers, None) is None
