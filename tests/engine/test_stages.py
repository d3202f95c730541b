"""The three stages as real children: the artifact in stock PyTorch, the same bytes again, resumed from anywhere."""

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_jobs import CLASSES, ConvNet, Mlp, Stage, quick, run_job, run_learn, save_data, save_model
from torch import Tensor, nn
from torch.nn import functional as F

from service.contract.errors import ErrorCode, ProblemError
from service.contract.plan import Form, RankRow
from service.contract.report import Report
from service.contract.spec import parse_spec
from worker.engine.emission import emit
from worker.engine.learn import Sources
from worker.engine.verification import verify


@dataclass
class Job:
    """A finished job and what it was made of."""

    model: Path
    data: Path
    spec: dict[str, Any]
    work_dir: Path
    stages: dict[str, Stage]

    @property
    def artifact(self) -> Path:
        return self.work_dir / "artifact.pt"

    @property
    def report(self) -> Report:
        return Report.model_validate_json((self.work_dir / "report.json").read_text())

    @property
    def checkpoints(self) -> list[Path]:
        return sorted((self.work_dir / "checkpoints").iterdir())


class ConvNetWithHelp(ConvNet):
    """A wide head, a second exported method, a plain attribute and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12 * 16, 96)
        self.head = nn.Linear(96, CLASSES)
        self.labels = ["a", "b", "c", "d"]
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv1(x)))
        x = F.relu(self.fc(self.dropout(F.relu(self.conv2(x)).flatten(1))))
        return self.head(x)

    @torch.jit.export
    def probabilities(self, x: Tensor) -> Tensor:
        return self.forward(x).softmax(1)


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("mlp")
    model = save_model(folder / "model.pt", Mlp(64, 96))
    data = save_data(folder / "data.npz", model, (64,), parts=("test_",))
    spec = quick(budget={"max_params_fraction": 0.4}, fine_tune={"epochs": 2})
    stages = run_job(folder / "w", model, spec, data=data, checkpoint_spacing_seconds=0)
    return Job(model, data, spec, folder / "w", stages)


@pytest.fixture(scope="module")
def convnet(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("convnet")
    model = save_model(folder / "model.pt", ConvNetWithHelp())
    data = save_data(folder / "data.npz", model, (2, 8, 8))
    spec = quick(budget={"max_macs_fraction": 0.4}, training={"optimizer": {"lr": "auto"}})
    return Job(model, data, spec, folder / "w", run_job(folder / "w", model, spec, data=data))


@pytest.fixture(params=["mlp", "convnet"])
def job(request: pytest.FixtureRequest) -> Job:
    made: Job = request.getfixturevalue(request.param)
    return made


def test_the_channel_tells_the_whole_story(job: Job) -> None:
    learn = job.stages["learn"]
    phases = [message["phase"] for message in learn.of("phase")]
    assert phases == ["starting", "inspecting", "learning", "fine_tuning"]
    assert [message["type"] for message in learn.messages].count("layers") == 1
    assert learn.last["type"] == "done"
    steps = [message["data"] for message in learn.of("event") if message["kind"] == "step"]
    assert [(step["step"], step["total_steps"]) for step in steps] == [(1, 3), (2, 3), (3, 3)]
    assert all(
        np.isfinite([step[name] for name in ("mu", "lambda", "loss", "penalty", "distance")]).all() for step in steps
    )
    rows = [RankRow.model_validate(row) for message in learn.of("ranks") for row in message["rows"]]
    chosen = {row.layer for row in rows if row.chosen}
    assert chosen == {layer["name"] for layer in learn.of("layers")[0]["layers"]}
    assert job.stages["emit"].last["result"]["sha256"] == hashlib.sha256(job.artifact.read_bytes()).hexdigest()
    parse_spec(learn.of("resolved")[-1]["spec"])


def test_the_report_holds_together(job: Job) -> None:
    report = job.report
    limit = report.budget
    assert limit is not None
    assert limit.reached <= limit.limit
    assert limit.reached == getattr(report.compressed, limit.metric)
    assert report.params_fraction == pytest.approx(report.compressed.params / report.reference.params)
    assert report.compressed.file_bytes == job.artifact.stat().st_size < job.model.stat().st_size
    assert report.hashes["artifact"] == hashlib.sha256(job.artifact.read_bytes()).hexdigest()
    assert report.fidelity.max_abs_difference_to_trained < 1e-4
    difference = report.differences[0]
    assert difference.name == report.metric_name == "accuracy"
    assert difference.low <= difference.difference <= difference.high
    assert report.reference.metric is not None
    assert report.compressed.metric is not None
    assert difference.difference == pytest.approx(report.compressed.metric - report.reference.metric)
    assert {latency.batch_size for latency in report.compressed.latencies} == {1, 64}
    assert [use.phase for use in report.phases][:4] == ["starting", "inspecting", "learning", "fine_tuning"]
    assert all(use.peak_memory_bytes > 0 for use in report.phases)
    assert {layer.name for layer in report.layers} >= {"fc1", "fc2"} or "conv1" in {
        layer.name for layer in report.layers
    }


def test_the_report_is_on_the_report_part(mlp: Job, convnet: Job) -> None:
    assert (mlp.report.report_part, mlp.report.report_samples) == ("test", 64)
    assert (convnet.report.report_part, convnet.report.report_samples) == ("report", 19)
    assert "NO_TEST_DATA" in [warning.code for warning in convnet.report.warnings]
    x, y = (np.load(mlp.data)[name] for name in ("test_inputs", "test_targets"))
    with torch.no_grad():
        right = torch.jit.load(str(mlp.artifact)).eval()(torch.from_numpy(x)).argmax(1).numpy() == y
    assert mlp.report.compressed.metric == pytest.approx(right.mean())


STOCK = """
import sys, json, torch
assert not any(name.split(".")[0] in {"worker", "service"} for name in sys.modules)
reference, artifact = (torch.jit.load(path) for path in sys.argv[1:3])
x = torch.randn(5, *json.loads(sys.argv[3]), generator=torch.Generator().manual_seed(0))
answer = {
    "schema": [str(m.forward.schema).split(" self", 1)[1] for m in (reference, artifact)],
    "methods": [sorted(m._c._method_names()) for m in (reference, artifact)],
    "training": [m.training for m in (reference, artifact)],
    "cpu": all(p.device.type == "cpu" for p in artifact.parameters()),
    "trainable": all(p.requires_grad for p in artifact.parameters()),
}
artifact.eval()
answer["eval repeats"] = torch.equal(artifact(x), artifact(x))
answer["shape"] = list(artifact(x).shape) == list(reference.eval()(x).shape)
answer["batch of one"] = torch.allclose(artifact(x[:1]), artifact(x)[:1], atol=1e-5)
artifact.train()
buffers = {name: b.clone() for name, b in artifact.named_buffers()}
artifact(x).sum().backward()
answer["gradients"] = all(p.grad is not None for p in artifact.parameters())
answer["buffers move"] = [name for name, b in artifact.named_buffers() if not torch.equal(b, buffers[name])]
answer["dropout"] = not torch.equal(artifact(x), artifact(x))
if hasattr(artifact, "probabilities"):
    artifact.eval()
    answer["labels"] = artifact.labels
    answer["probabilities"] = torch.allclose(artifact.probabilities(x), artifact(x).softmax(1), atol=1e-6)
print(json.dumps(answer))
"""


def stock(job: Job, shape: tuple[int, ...], folder: Path) -> dict[str, Any]:
    run = [sys.executable, "-W", "ignore", "-I", "-c", STOCK, str(job.model), str(job.artifact), json.dumps(shape)]
    made = subprocess.run(run, capture_output=True, cwd=folder, check=False)
    assert made.returncode == 0, made.stderr.decode()
    answer: dict[str, Any] = json.loads(made.stdout)
    return answer


def test_the_artifact_is_the_same_module_to_its_users(convnet: Job, mlp: Job, tmp_path: Path) -> None:
    answer = stock(convnet, (2, 8, 8), tmp_path)
    for name in ("schema", "training"):
        assert answer[name][0] == answer[name][1], name
    assert answer["methods"][0] == answer["methods"][1] == ["forward", "probabilities"]
    assert answer["buffers move"] == ["bn.running_mean", "bn.running_var", "bn.num_batches_tracked"]
    assert answer["labels"] == ["a", "b", "c", "d"]
    for name in ("cpu", "trainable", "eval repeats", "shape", "batch of one", "gradients", "dropout", "probabilities"):
        assert answer[name], name
    plain = stock(mlp, (64,), tmp_path)
    assert not plain["dropout"]
    assert plain["gradients"]


def test_the_dense_weights_are_gone(job: Job) -> None:
    module = torch.jit.load(str(job.artifact))
    names = dict(module.named_parameters())
    forms = {layer.name: layer.form for layer in job.report.layers}
    for layer in job.report.layers:
        if layer.weight is not None and layer.form != Form.DENSE:
            assert layer.weight not in names
    assert any(form != Form.DENSE for form in forms.values())
    assert sum(parameter.numel() for parameter in module.parameters()) == job.report.compressed.params


def test_the_same_job_gives_the_same_bytes(convnet: Job, tmp_path: Path) -> None:
    run_job(tmp_path, convnet.model, convnet.spec, data=convnet.data, only=("learn", "emit"))
    assert (tmp_path / "artifact.pt").read_bytes() == convnet.artifact.read_bytes()


def test_a_checkpoint_is_written_after_every_step_and_epoch(mlp: Job) -> None:
    told = mlp.stages["learn"].of("checkpoint")
    assert [Path(message["path"]).name for message in told] == [path.name for path in mlp.checkpoints]
    # The start; each L step and C step; the settled ranks, their learning rate, and each epoch of that network.
    assert len(told) == 1 + 3 * 2 + 1 + 1 + 2
    for message in told:
        content = Path(message["path"]).read_bytes()
        assert (message["sha256"], message["bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))


def test_a_resumed_job_gives_the_same_bytes(mlp: Job, tmp_path: Path) -> None:
    """From the one after the second C step in new processes; from others in one process, in test_resume.py."""
    stages = {"data": mlp.data, "resume_path": mlp.checkpoints[2 * 2], "only": ("learn", "emit")}
    resumed = run_job(tmp_path, mlp.model, mlp.spec, **stages)
    assert (tmp_path / "artifact.pt").read_bytes() == mlp.artifact.read_bytes()
    steps = [message["data"]["step"] for message in resumed["learn"].of("event") if message["kind"] == "step"]
    assert steps == [3]


def verify_here(work_dir: Path, model: Path, spec: dict[str, Any], data: Path | None = None) -> Report:
    sources = Sources(model, data, None if data is None else "npz", work_dir)
    return verify(sources, parse_spec(spec), {}, list)


def test_direct_compression_without_data(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model.pt", Mlp(64, 96))
    spec = {"budget": {"max_params_fraction": 0.5}, "example_inputs": [{"shape": [1, 64]}], "device": "cpu"}
    run_learn(tmp_path / "w", model, spec)
    emit(model, tmp_path / "w")
    report = verify_here(tmp_path / "w", model, spec)
    assert report.differences == []
    assert report.report_part is None
    assert report.fidelity.relative_error_to_reference is not None
    assert 0 < report.fidelity.relative_error_to_reference < 1
    assert report.budget is not None
    assert 0.9 * report.budget.limit <= report.budget.reached <= report.budget.limit


def test_an_artifact_that_is_not_the_trained_network_is_not_let_through(mlp: Job, tmp_path: Path) -> None:
    """The last stage compares with what the first has left, whatever lies between."""
    for name in ("final.json", "expected.safetensors", "final.safetensors"):
        (tmp_path / name).write_bytes((mlp.work_dir / name).read_bytes())
    scaled = torch.jit.load(str(mlp.artifact))
    with torch.no_grad():
        next(iter(scaled.parameters())).mul_(1.5)
    for wrong in (scaled, torch.jit.load(str(mlp.model))):
        torch.jit.save(wrong, tmp_path / "artifact.pt")
        with pytest.raises(ProblemError) as caught:
            verify_here(tmp_path, mlp.model, mlp.spec, mlp.data)
        assert caught.value.code == ErrorCode.VERIFICATION_FAILED
    (tmp_path / "artifact.pt").write_bytes(mlp.artifact.read_bytes()[:-500])
    with pytest.raises(ProblemError) as caught:
        verify_here(tmp_path, mlp.model, mlp.spec, mlp.data)
    assert caught.value.code == ErrorCode.VERIFICATION_FAILED


def test_a_file_that_is_not_smaller_is_not_let_through(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model.pt", Mlp(8, 8))  # the code of two more layers weighs more than their weights
    run_learn(tmp_path / "w", model, quick(budget={"max_params_fraction": 0.9}, example_inputs=[{"shape": [1, 8]}]))
    with pytest.raises(ProblemError) as caught:
        emit(model, tmp_path / "w")
    assert caught.value.code == ErrorCode.CONSTRAINT_UNREACHABLE
    assert str(model.stat().st_size) in caught.value.detail
