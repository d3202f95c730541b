"""The main job through HTTP, with the real service, worker and engine."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import bad_models
import pytest
from served import Service

from service.client import Client, ServiceProblem
from service.contract.errors import ErrorCode
from service.contract.states import JobState

SHORT = {
    "budget": {"max_macs_fraction": 0.4},
    "method": {"type": "learning_compression", "mu": {"steps": 5}},
    "training": {"epochs_per_step": 1, "batch_size": 128},
    "fine_tune": {"epochs": 3},
}
ENDLESS = SHORT | {
    "method": {"type": "learning_compression", "mu": {"steps": 1000}},
    "training": {"epochs_per_step": 50, "batch_size": 16},
}
LOADED = """
import sys, json, numpy, torch
network = torch.jit.load(sys.argv[1]).eval()
data = numpy.load(sys.argv[2])
outputs = network(torch.from_numpy(data["inputs"])).argmax(1).numpy()
print(json.dumps({"accuracy": float((outputs == data["targets"]).mean()),
                  "params": sum(p.numel() for p in network.parameters())}))
"""


def spec_file(folder: Path, spec: dict[str, object]) -> Path:
    path = folder / "spec.json"
    path.write_text(json.dumps(spec))
    return path


def client_of(service: Service) -> Client:
    return Client(service.url, service.key)


def test_the_whole_trip(service: Service, model_file: Path, data_file: Path, tmp_path: Path) -> None:
    small, junit = tmp_path / "small.pt", tmp_path / "junit.xml"
    done = service.rankpress(
        "compress", model_file, "--data", data_file, "--spec", spec_file(tmp_path, SHORT), "--output", small,
        "--junit", junit, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    job_id, report = document["job"]["id"], document["report"]
    assert report["budget"]["reached"] <= report["budget"]["limit"]
    assert report["macs_fraction"] <= 0.4
    assert small.stat().st_size == report["compressed"]["file_bytes"] < model_file.stat().st_size
    assert hashlib.sha256(small.read_bytes()).hexdigest() == document["artifact"]["sha256"]
    assert "<failure" not in junit.read_text()

    loaded = subprocess.run(
        [sys.executable, "-I", "-c", LOADED, small, data_file], check=True, capture_output=True, text=True
    )
    scored = json.loads(loaded.stdout)
    assert scored["accuracy"] > 0.8
    assert scored["params"] == report["compressed"]["params"]

    with client_of(service) as client:
        layers = client.layers(job_id, history=True)
        assert [layer.name for layer in layers.items] == ["0", "2", "5"]
        assert layers.history
        assert len({row.step for row in layers.history}) > 1
        assert any(row.chosen for row in layers.history)
        events = list(client.events(job_id))
        assert [event.id for event in events] == sorted({event.id for event in events})
        assert client.report(job_id).job_id in {None, job_id}
        assert "torchscript" in {artifact.format for artifact in client.artifacts(job_id)}
    shown = service.rankpress("inspect", job_id, "--history")
    assert shown.returncode == 0
    assert "MACs before" in shown.stdout


def test_a_budget_out_of_reach(service: Service, model_file: Path, data_file: Path, tmp_path: Path) -> None:
    spec = SHORT | {"budget": {"max_macs": 10}}
    done = service.rankpress("compress", model_file, "--data", data_file, "--spec", spec_file(tmp_path, spec), "--json")
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["problem"]["code"] == "CONSTRAINT_UNREACHABLE"


def test_a_file_that_is_no_model(service: Service, data_file: Path) -> None:
    done = service.rankpress("compress", data_file, "--max-macs-fraction", "0.5", "--json")
    assert done.returncode == 2, done.stderr
    assert json.loads(done.stdout)["problem"]["code"] == "MODEL_NOT_TORCHSCRIPT"


def test_a_job_that_fails(service: Service, data_file: Path, tmp_path: Path) -> None:
    model = bad_models.write(tmp_path / "raises.pt", bad_models.scripted(bad_models.Raises()))
    done = service.rankpress("compress", model, "--data", data_file, "--max-macs-fraction", "0.5", "--json")
    assert done.returncode == 1, done.stderr
    problem = json.loads(done.stdout)["problem"]
    assert problem["code"] == "MODEL_RAISED"
    assert "the tide is out" in problem["detail"]


def test_no_time_to_wait(service: Service, model_file: Path, data_file: Path, tmp_path: Path) -> None:
    done = service.rankpress(
        "compress", model_file, "--data", data_file, "--spec", spec_file(tmp_path, ENDLESS), "--timeout", "1", "--json"
    )
    assert done.returncode == 4, done.stderr
    job = json.loads(done.stdout)["job"]
    assert not JobState(job["state"]).terminal, "the job goes on"
    assert service.rankpress("cancel", job["id"]).returncode == 0


def test_no_service(service: Service, model_file: Path) -> None:
    done = service.rankpress("compress", model_file, "--max-macs-fraction", "0.5", "--url", "http://127.0.0.1:9")
    assert done.returncode == 5, done.stderr
    assert "127.0.0.1:9" in done.stderr


def test_a_wrong_key(service: Service) -> None:
    with Client(service.url, "a wrong key of enough length") as client, pytest.raises(ServiceProblem) as refused:
        list(client.jobs())
    assert refused.value.problem.code is ErrorCode.UNAUTHENTICATED


def test_a_second_service_on_the_same_folder_is_refused(service: Service) -> None:
    second = service.rankpress("serve", "--data", service.folder / "data", "--port", "0", timeout_seconds=60)
    assert second.returncode != 0
    assert "serves it" in second.stderr
