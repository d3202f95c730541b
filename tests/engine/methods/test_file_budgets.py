"""Budgets in bytes are of the file as it is written: nearly all of it is used, and never more."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_jobs import ConvNet, Mlp, quick, run_job, run_learn, save_data, save_model
from torch import Tensor, nn

from service.contract.errors import ErrorCode, ProblemError
from worker.engine.emission import ARTIFACT, emit
from worker.engine.file_size import artifact_bytes


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Linear(40, 64)
        self.rnn = nn.LSTM(64, 32, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(torch.relu(self.front(x)))[0])


class Wide(ConvNet):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 40, 3, padding=1)
        self.bn = nn.BatchNorm2d(40)
        self.conv2 = nn.Conv2d(40, 48, 3, stride=2, padding=1, bias=False)
        self.fc = nn.Linear(48 * 16, 16)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: Mlp(200, 120), (200,)),
    "convolutions": (Wide, (2, 8, 8)),
    "lstm": (Tagger, (5, 40)),
}
MATRIX = {"type": "low_rank", "reshape": "matrix"}
PRUNE = {"type": "prune"}
TERMS: dict[str, list[dict[str, Any]]] = {
    "low_rank": [{"type": "low_rank", "reshape": "best"}],
    "stored_short": [MATRIX | {"store_dtype": "float16"}],
    "quantized_factors": [MATRIX | {"then": {"type": "quantize", "scheme": "fixed_point", "bits": 4}}],
    "pruned": [PRUNE],
    "low_rank_and_sparse": [MATRIX, PRUNE],
    "codes_and_corrections": [{"type": "quantize", "values": 2}, PRUNE],
    "tucker2": [{"type": "tucker2"}],
}
# A network, its terms, the fraction, and the share that must be used: where one more unit, or the code of one more
# shape, is dear, less than the usual.
JOBS = [
    ("mlp", "low_rank", 0.3, 0.97),
    ("mlp", "stored_short", 0.25, 0.97),
    ("mlp", "quantized_factors", 0.25, 0.97),
    ("mlp", "pruned", 0.45, 0.97),
    ("mlp", "low_rank_and_sparse", 0.5, 0.97),
    ("mlp", "codes_and_corrections", 0.6, 0.97),
    ("convolutions", "low_rank", 0.5, 0.97),
    ("convolutions", "tucker2", 0.7, 0.9),
    ("lstm", "low_rank", 0.65, 0.97),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save_model(folder / f"{name}.pt", make()) for name, (make, _) in NETWORKS.items()}


def spec_of(name: str, terms: str, limit: int) -> dict[str, Any]:
    kind = {"kind": "conv2d"} if terms == "tucker2" else {}
    return quick(
        budget={"max_bytes": limit},
        layers=[{"match": "*", "terms": TERMS[terms], **kind}],
        example_inputs=[{"shape": [1, *NETWORKS[name][1]]}],
    )


@pytest.mark.parametrize(("name", "terms", "fraction", "share"), JOBS)
def test_nearly_all_of_the_file_is_used(
    name: str, terms: str, fraction: float, share: float, models: dict[str, Path], tmp_path: Path
) -> None:
    limit = int(fraction * models[name].stat().st_size)
    run_learn(tmp_path, models[name], spec_of(name, terms, limit))
    assert share * limit <= emit(models[name], tmp_path)["bytes"] <= limit


def test_what_is_said_to_be_the_least_is_reached_and_less_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ProblemError) as refused:
        run_learn(tmp_path, models["mlp"], spec_of("mlp", "low_rank", 1000))
    assert refused.value.code == ErrorCode.CONSTRAINT_UNREACHABLE
    least = int(refused.value.detail.split("lowest rank the network has ")[1].split()[0])
    with pytest.raises(ProblemError):
        run_learn(tmp_path, models["mlp"], spec_of("mlp", "low_rank", least - 1))
    run_learn(tmp_path, models["mlp"], spec_of("mlp", "low_rank", least + 512))
    assert emit(models["mlp"], tmp_path)["bytes"] <= least + 512


def test_a_file_has_the_same_size_whatever_was_scripted_before(models: dict[str, Path], tmp_path: Path) -> None:
    """What is measured while ranks are chosen is what a fresh process writes after training."""
    data = save_data(tmp_path / "data.npz", models["mlp"], (200,), 96)
    limit = int(0.4 * models["mlp"].stat().st_size)
    work = tmp_path / "work"
    spec = quick(budget={"max_bytes": limit}, method={"mu": {"steps": 2}})
    run_job(work, models["mlp"], spec, data=data, only=("learn", "emit"))
    size = (work / ARTIFACT).stat().st_size
    assert 0.97 * limit <= size <= limit
    learned = run_learn(tmp_path / "again", models["mlp"], spec, data)
    recipe = learned.plan["recipe"]
    first = artifact_bytes(models["mlp"], recipe)
    assert artifact_bytes(models["mlp"], recipe) == first
    assert emit(models["mlp"], tmp_path / "again")["bytes"] == len(first)
