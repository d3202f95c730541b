"""Sums of terms of any kinds, through the whole engine: sizes are true, budgets hold, the file is smaller."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_jobs import save_data, save_model
from torch import Tensor, nn

from service.contract.plan import Form
from service.contract.report import Report
from service.contract.spec import parse_spec
from worker.engine.emission import emit
from worker.engine.learn import Sources, learn
from worker.engine.observer import Recorder
from worker.engine.verification import verify


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 160)
        self.fc2 = nn.Linear(160, 160)
        self.head = nn.Linear(160, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.head(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))
        return hidden


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.fc = nn.Linear(32 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(torch.relu(self.conv2(torch.relu(self.conv1(x)))).flatten(1))
        return scores


QUICK = {
    "method": {"mu": {"steps": 2}},
    "training": {"epochs_per_step": 1, "optimizer": {"lr": 0.05}},
    "fine_tune": {"epochs": 1},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("mixed")
    model = save_model(folder / "model.pt", Wide())
    return model, save_data(folder / "data.npz", model, (64,))


def compress(files: tuple[Path, Path], folder: Path, **changes: Any) -> Report:
    work = folder / "work"
    work.mkdir()
    sources, spec = Sources(files[0], files[1], "npz", work), parse_spec({**QUICK, **changes})
    learn(sources, spec, Recorder())
    emit(files[0], work)
    report = verify(sources, spec, {}, list)
    assert sum(layer.compressed_params for layer in report.layers) == report.compressed.params
    assert sum(layer.compressed_macs or 0 for layer in report.layers) == report.compressed.macs
    assert report.fidelity.max_abs_difference_to_trained <= 1e-6
    return report


def terms(*each: dict[str, Any]) -> dict[str, Any]:
    return {"layers": [{"terms": list(each)}]}


def test_two_values_and_corrections(files: tuple[Path, Path], tmp_path: Path) -> None:
    report = compress(
        files, tmp_path, **terms({"type": "quantize", "values": 2}, {"type": "prune", "keep_fraction": 0.01})
    )
    assert {layer.form for layer in report.layers} == {Form.SUM}
    assert report.file_bytes_fraction < 0.3
    assert report.macs_fraction == 1.0
    assert all(term.macs_stay for layer in report.layers for term in layer.terms)
    assert [term.summary for term in report.layers[1].terms] == ["2 values", "kept 1.0 %"]


def test_a_budget_of_bytes_is_that_of_the_file(files: tuple[Path, Path], tmp_path: Path) -> None:
    report = compress(
        files, tmp_path, budget={"max_bytes_fraction": 0.4}, **terms({"reshape": "matrix"}, {"type": "prune"})
    )
    assert report.budget is not None
    assert report.budget.metric == "bytes"
    assert report.budget.reached == report.compressed.file_bytes <= 0.4 * report.reference.file_bytes
    assert report.budget.reached >= 0.95 * report.budget.limit


def test_a_parameter_that_a_rule_names_keeps_its_operator(files: tuple[Path, Path], tmp_path: Path) -> None:
    rules = {"layers": [{"match": "parameter:fc*.weight"}, {"match": "*", "keep": "dense"}]}
    report = compress(files, tmp_path, budget={"max_params_fraction": 0.25}, **rules)
    kinds = {layer.name: (layer.kind, layer.form) for layer in report.layers}
    assert kinds["fc1.weight"] == kinds["fc2.weight"] == ("parameter", Form.COMPOSED)
    assert report.macs_fraction == 1.0
    assert report.params_fraction <= 0.25  # less than either of them is when dense


def test_the_reshape_is_chosen_within_the_budget(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model.pt", Convolutions())
    data = save_data(tmp_path / "data.npz", model, (2, 8, 8))
    report = compress((model, data), tmp_path, budget={"max_macs_fraction": 0.6}, **terms({"reshape": "best"}))
    assert report.macs_fraction <= 0.6
    assert {layer.form for layer in report.layers} & {Form.CHANNEL, Form.SPATIAL, Form.SPATIAL_TRANSPOSED}


def test_tucker_within_the_budget(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model.pt", Convolutions())
    data = save_data(tmp_path / "data.npz", model, (2, 8, 8))
    rules = {"layers": [{"kind": "conv2d", "terms": [{"type": "tucker2"}]}, {"match": "*"}]}
    report = compress((model, data), tmp_path, budget={"max_macs_fraction": 0.7}, **rules)
    assert report.macs_fraction <= 0.7
    assert Form.TUCKER2 in {layer.form for layer in report.layers}


def test_the_bias_alone(files: tuple[Path, Path], tmp_path: Path) -> None:
    rules = [{"match": "fc2", "min_rank": 0, "cost_factor": 1e9}, {"match": "*", "keep": "dense"}]
    report = compress(files, tmp_path, method={"lambda": 1.0, "mu": {"steps": 2, "initial": 1e-3}}, layers=rules)
    layer = next(layer for layer in report.layers if layer.name == "fc2")
    assert layer.form == Form.BIAS_ALONE
    assert (layer.compressed_params, layer.compressed_macs) == (160, 0)
