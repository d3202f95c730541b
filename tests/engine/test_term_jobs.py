"""Jobs whose layers take low-rank, Tucker-2, Kronecker, best, cast and quantized terms on layers of many kinds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_jobs import CLASSES, quick, run_learn, save_data, save_model
from torch import Tensor, nn
from torch.nn import functional as F

from service.contract.plan import Form
from service.contract.spec import parse_spec
from worker.engine.assembly import assemble, load_state
from worker.engine.emission import emit
from worker.engine.learn import Sources
from worker.engine.verification import verify


class Kinds(nn.Module):
    """Convolutions of one, two and three axes, grouped, depthwise and transposed, and a product with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 64, 3, padding="same")
        self.grouped = nn.Conv2d(64, 64, 3, padding=1, groups=2, stride=2)
        self.depthwise = nn.Conv2d(64, 64, 5, padding=2, groups=64)
        self.up = nn.ConvTranspose2d(64, 48, 4, stride=2, padding=1)
        self.flat = nn.Conv1d(48, 112, 3)
        self.deep = nn.Conv3d(1, 6, 3, padding=1)
        self.last = nn.Conv3d(6, 16, 3, stride=2)
        self.mix = nn.Parameter(torch.randn(128, 192) / 12)
        self.head = nn.Linear(192, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(F.relu(self.depthwise(F.relu(self.grouped(F.relu(self.plain(x))))))))
        y = F.relu(self.flat(x.flatten(2)))
        z = F.relu(self.last(F.relu(self.deep(x.unsqueeze(1)))))
        return self.head(F.relu(torch.cat([y.mean(2), z.mean((2, 3, 4))], dim=1) @ self.mix))


RULES: dict[str, list[dict[str, Any]]] = {
    "cast": [
        {"match": "deep", "keep": "dense"},
        {"match": "*", "terms": [{"reshape": "best", "store_dtype": "bfloat16"}]},
    ],
    "mixed": [
        {"match": "plain", "terms": [{"type": "tucker2"}]},
        {"match": "last", "terms": [{"type": "tucker2", "ranks": [4, 3]}, {"reshape": "spatial"}]},
        {"match": "up", "terms": [{"reshape": "kronecker"}, {"reshape": "channel"}]},
        {"match": "depthwise", "terms": [{"reshape": "spatial"}]},
        {"match": "*", "terms": "auto"},
    ],
    "quantized": [
        {"match": each, "terms": [{"reshape": name, "then": {"type": "quantize", "bits": 4}}]}
        for each, name in (("up", "channel"), ("grouped", "channel"), ("mix", "matrix"))
    ],
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("kinds")
    model = save_model(folder / "model.pt", Kinds())
    return model, save_data(folder / "data.npz", model, (3, 8, 8), count=96, parts=("test_",))


@pytest.mark.parametrize("name", ["cast", "mixed", pytest.param("quantized", marks=pytest.mark.full)])
def test_a_job_ends_in_an_artifact_that_answers_as_it_was_trained(
    name: str, sources: tuple[Path, Path], tmp_path: Path
) -> None:
    model, data = sources
    metric = "max_bytes_fraction" if name == "quantized" else "max_params_fraction"
    spec = quick(layers=RULES[name], budget={metric: 0.8 if name == "quantized" else 0.6}, method={"mu": {"steps": 2}})
    learned = run_learn(tmp_path / "w", model, spec, data=data)
    emit(model, tmp_path / "w")
    report = verify(Sources(model, data, "npz", tmp_path / "w"), parse_spec(spec), {}, list)
    assert report.budget is not None
    forms = {row.form for row in learned.final_rows} - {Form.DENSE}
    assert forms
    artifact = torch.jit.load(str(tmp_path / "w" / "artifact.pt")).eval()
    network = assemble(model, learned.plan["recipe"], torch.device("cpu")).eval()
    load_state(network, learned.state)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(artifact(x), network(x), atol=1e-5)
    kinds = {parameter.dtype for parameter in artifact.parameters()}
    assert (torch.bfloat16 in kinds) == (name == "cast")
    trained = {parameter.dtype for parameter in network.parameters()}
    assert trained == {torch.float32}  # steps of training are too small for 16 bits
    artifact.train()(x).sum().backward()
    assert any(parameter.grad is not None for parameter in artifact.parameters())
