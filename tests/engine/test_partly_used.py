"""Layers that only some samples run, parameters that nothing reads, and networks that draw random numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_jobs import quick, run_learn, save_model
from torch import Tensor, nn
from torch.nn import functional as F

from service.contract.plan import Form, LayerPlan, ReasonCode
from service.contract.report import Report
from service.contract.spec import parse_spec
from worker.engine.emission import emit
from worker.engine.learn import Sources
from worker.engine.network.costs import count_params
from worker.engine.verification import verify


class Experts(nn.Module):
    """Each sample runs one of four experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(20, 4)
        self.experts = nn.ModuleList([nn.Linear(20, 60) for _ in range(4)])
        self.head = nn.Linear(60, 4)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).argmax(1)
        y = torch.zeros(x.size(0), 60)
        for at, expert in enumerate(self.experts):
            rows = (chosen == at).nonzero().squeeze(1)
            if rows.numel() > 0:
                y = y.index_put((rows,), expert(x[rows]))
        return self.head(torch.relu(y))


class ExpertsOnNoRows(Experts):
    """An expert that no sample chose runs on an empty batch."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).argmax(1)
        y = torch.zeros(x.size(0), 60)
        for at, expert in enumerate(self.experts):
            rows = (chosen == at).nonzero().squeeze(1)
            y = y.index_put((rows,), expert(x[rows]))
        return self.head(torch.relu(y))


class Leftovers(nn.Module):
    """A layer that nothing calls, and one whose result nobody takes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(20, 120)
        self.dropped = nn.Linear(120, 120)
        self.head = nn.Linear(120, 4)
        self.unused = nn.Linear(50, 50)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.body(x))
        _ = self.dropped(x)
        return self.head(x)


class Sampled(nn.Module):
    """An autoencoder that draws its code, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(20, 120)
        self.mean = nn.Linear(120, 8)
        self.spread = nn.Linear(120, 8)
        self.decoder = nn.Linear(8, 120)
        self.out = nn.Linear(120, 20)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.encoder(x))
        mean = self.mean(h)
        code = mean + torch.randn_like(mean) * F.softplus(self.spread(h))
        return self.out(torch.relu(self.decoder(code))), mean


def compressed(folder: Path, net: nn.Module, fraction: float) -> tuple[Report, dict[str, LayerPlan]]:
    """Run the three stages without targets."""
    model, data, work = save_model(folder / "model.pt", net), folder / "data.npz", folder / "w"
    np.savez(data, inputs=np.random.default_rng(0).standard_normal((128, 20)).astype("f"))
    spec = quick(budget={"max_params_fraction": fraction})
    run_learn(work, model, spec, data)
    emit(model, work)
    report = verify(Sources(model, data, "npz", work), parse_spec(spec), {}, list)
    return report, {layer.name: layer for layer in report.layers}


@pytest.mark.parametrize("net", [Experts, ExpertsOnNoRows])
def test_experts_that_the_first_sample_does_not_choose_are_compressed(net: type[nn.Module], tmp_path: Path) -> None:
    report, plan = compressed(tmp_path, net(), 0.5)
    experts = [plan[f"experts.{at}"] for at in range(4)]
    assert {layer.form for layer in experts} == {Form.MATRIX}
    assert sorted(layer.calls for layer in experts) == [0, 0, 0, 1]
    assert report.compressed.macs == sum(layer.compressed_macs or 0 for layer in plan.values())
    assert report.compressed.params == sum(layer.compressed_params for layer in plan.values())


def test_what_nothing_reads_is_gone_and_leaves_its_room_to_the_others(tmp_path: Path) -> None:
    report, plan = compressed(tmp_path, Leftovers(), 0.14)
    for name in ("dropped", "unused"):
        assert (plan[name].reason, plan[name].compressed_params) == (ReasonCode.UNUSED, 0)
    artifact = torch.jit.load(str(tmp_path / "w" / "artifact.pt"))
    assert count_params(artifact) == report.compressed.params
    assert report.compressed.params == sum(layer.compressed_params for layer in plan.values())
    assert report.budget is not None
    assert report.budget.reached > report.budget.limit - 160


def test_a_network_that_draws_random_numbers_is_compared_on_the_same_ones(tmp_path: Path) -> None:
    report, _ = compressed(tmp_path, Sampled(), 0.5)
    assert report.fidelity.max_abs_difference_to_trained < 1e-4
