"""Losses of the user's own through HTTP and the command, with the real service, worker and engine."""

import hashlib
import json
from pathlib import Path

import pytest
from served import Service

from service.client import Client
from service.contract.errors import ErrorCode
from service.contract.states import JobState
from tests.engine.own_objectives import CASES, save_case
from tests.engine.tiny_jobs import archive, quick


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_detector_with_a_list_output_by_the_command(service: Service, tmp_path: Path) -> None:
    model, data, objective = save_case(CASES["detector"], tmp_path)
    (spec := tmp_path / "spec.json").write_text(json.dumps(quick(training={"optimizer": {"lr": 0.02}})))
    done = service.rankpress(
        "compress", model, "--data", data, "--objective", objective, "--spec", spec, "--max-params-fraction", "0.5",
        "--output", tmp_path / "small.pt", "--report", tmp_path / "report.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["hashes"]["objective"] == sha256(objective)
    assert (report["metric_name"], report["higher_is_better"]) == ("metric", True)
    assert report["differences"][0]["verdict"] in {"better", "worse", "unclear"}
    assert any(word in done.stdout for word in ("better", "worse", "no clear difference"))
    with Client(service.url, service.key) as client:
        job = client.job(report["job_id"])
        assert job.spec["objective"]["loss"] == {"module": job.objective_model_id}


@pytest.mark.full
def test_a_loss_that_raises_fails_the_job_with_its_own_words(service: Service, tmp_path: Path) -> None:
    model, data, objective = save_case(CASES["tagger"], tmp_path, count=40)
    objective.write_bytes(archive(CASES["unet"].objective()))  # asks for masks, of which there are none
    with Client(service.url, service.key) as client:
        loss = client.upload_model(objective)
        asked = quick(budget={"max_params_fraction": 0.5})
        job = client.submit(asked, model=client.upload_model(model).id, data=data, objective=loss.id)
        assert job.objective_model_id == loss.id
        ended = client.wait(job.id, timeout_seconds=120)
    assert ended.state is JobState.FAILED
    assert ended.problem is not None
    assert ended.problem.code is ErrorCode.OBJECTIVE_RAISED
    assert "'targets' (8, 6)" in ended.problem.detail


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in CASES if name != "detector"])
def test_every_kind_of_network(name: str, service: Service, tmp_path: Path) -> None:
    case = CASES[name]
    model, data, objective = save_case(case, tmp_path)
    asked = quick(budget={"max_params_fraction": 0.5}, training={"optimizer": {"lr": 0.02}}, **(case.spec or {}))
    with Client(service.url, service.key) as client:
        ended = client.wait(client.submit(asked, model=model, data=data, objective=objective).id, timeout_seconds=120)
        assert ended.state is JobState.SUCCEEDED, ended.problem
        report = client.report(ended.id)
    assert report.hashes["objective"] == sha256(objective)
    assert (report.metric_name, report.higher_is_better) == (case.metric, case.higher_is_better)
    assert ended.result is not None
    assert ended.result.metric_difference_low is not None
