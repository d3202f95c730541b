"""A package that adds a term: found, described, planned and summed, without a change of ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from tests.engine.tiny_jobs import save_data, save_model

PACKAGE = Path(__file__).parent.parent / "plugin" / "circulant_term"
SCRIPT = """
import json, sys
from pathlib import Path
from service.contract.schemas import spec_schema
from service.contract.spec import parse_spec
from service.jobs.capabilities import installed_terms
from worker.engine.emission import emit
from worker.engine.learn import Sources, learn
from worker.engine.observer import Recorder
from worker.engine.verification import verify

model, data, work = map(Path, sys.argv[1:4])
spec = parse_spec(json.loads(sys.argv[4]))
sources, recorder = Sources(model, data, "npz", work), Recorder()
learn(sources, spec, recorder)
emit(model, work)
report = verify(sources, spec, {}, lambda: [])
print(json.dumps({
    "terms": installed_terms(), "schema": "CirculantTermSpec" in spec_schema()["$defs"],
    "layers": [layer.model_dump(mode="json") for layer in report.layers],
    "difference": report.fidelity.max_abs_difference_to_trained,
}))
"""


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(80, 80)
        self.head = nn.Linear(80, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.first(x)))


def test_a_package_adds_a_term(tmp_path: Path) -> None:
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in PACKAGE.glob("*.py"))
    assert lines <= 80
    installed = tmp_path / "installed"
    source = tmp_path / "source"
    source.mkdir()
    for file in PACKAGE.iterdir():
        if file.is_file():
            (source / file.name).write_bytes(file.read_bytes())
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", installed]
    subprocess.run([sys.executable, *pip, source], check=True)
    model = save_model(tmp_path / "model.pt", Squares())
    data = save_data(tmp_path / "data.npz", model, (80,))
    spec = {
        "budget": {"max_params_fraction": 0.5},
        "layers": [
            {"match": "first", "terms": [{"type": "circulant"}, {"reshape": "matrix"}]},
            {"match": "head", "keep": "dense"},
        ],
        "method": {"mu": {"steps": 2}},
        "training": {"epochs_per_step": 1, "optimizer": {"lr": 0.05}},
        "fine_tune": {"epochs": 1},
    }
    work = tmp_path / "work"
    work.mkdir()
    made = subprocess.run(
        [sys.executable, "-c", SCRIPT, model, data, work, json.dumps(spec)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), str(Path.cwd())])},
    )
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout.splitlines()[-1])
    assert {
        "type": "circulant",
        "description": "A square matrix whose rows are turns of one row: n numbers for n² weights.",
    } in found["terms"]
    assert found["schema"]
    first = next(layer for layer in found["layers"] if layer["name"] == "first")
    assert first["form"] == "sum"
    assert [term["type"] for term in first["terms"]] == ["circulant", "low_rank"]
    assert first["compressed_params"] < first["params"]
    assert found["difference"] < 1e-5
