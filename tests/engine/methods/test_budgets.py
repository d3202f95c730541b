"""Budgets are held exactly, as PyTorch counts the finished file; other ways to say the size do what they say."""

import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_jobs import ConvNet, Learned, Looped, Mlp, quick, run_learn, save_data, save_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from service.contract.errors import ErrorCode, ProblemError
from service.contract.events import EventKind
from service.contract.plan import Form, ReasonCode
from worker.engine.assembly import assemble, load_state
from worker.engine.network.export import export_bytes

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: Mlp(48, 64), (48,)),
    "convnet": (ConvNet, (2, 8, 8)),
    "looped": (Looped, (20,)),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    made = {}
    for name, (make, shape) in CASES.items():
        folder = tmp_path_factory.mktemp(name)
        model = save_model(folder / "model.pt", make())
        made[name] = model, save_data(folder / "data.npz", model, shape)
    return made


def artifact_of(learned: Learned, model: Path) -> torch.jit.ScriptModule:
    network = assemble(model, learned.plan["recipe"], torch.device("cpu"))
    load_state(network, learned.state)
    return torch.jit.load(io.BytesIO(export_bytes(network)))


def count(module: torch.jit.ScriptModule, shape: tuple[int, ...]) -> dict[str, int]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.eval()(torch.randn(1, *shape))
    return {"macs": counter.get_total_flops() // 2, "params": sum(p.numel() for p in module.parameters())}


def sizes(learned: Learned, model: Path, shape: tuple[int, ...]) -> tuple[dict[str, int], dict[str, int]]:
    return count(torch.jit.load(str(model)), shape), count(artifact_of(learned, model), shape)


def examples(shape: tuple[int, ...]) -> list[dict[str, Any]]:
    return [{"shape": [1, *shape]}]


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("fraction", [0.35, 0.6])
@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("absolute", [False, True])
def test_without_data(
    name: str, fraction: float, metric: str, absolute: bool, files: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    model, _ = files[name]
    shape = CASES[name][1]
    whole = count(torch.jit.load(str(model)), shape)[metric]
    limit = int(fraction * whole)
    budget = {f"max_{metric}": limit} if absolute else {f"max_{metric}_fraction": fraction}
    learned = run_learn(tmp_path, model, quick(budget=budget, example_inputs=examples(shape)))
    _, reached = sizes(learned, model, shape)
    assert 0.9 * limit <= reached[metric] <= limit
    rows = learned.final_rows
    assert sum(row.macs for row in rows) == reached["macs"]
    assert sum(row.params for row in rows) == reached["params"]


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("budget", [{"max_macs_fraction": 0.4}, {"max_params_fraction": 0.5}])
def test_with_training(
    name: str, budget: dict[str, float], files: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    model, data = files[name]
    shape = CASES[name][1]
    learned = run_learn(tmp_path, model, quick(budget=budget, method={"mu": {"steps": 6}}), data)
    whole, reached = sizes(learned, model, shape)
    ((field, fraction),) = budget.items()
    metric = field.split("_")[1]
    limit = int(fraction * whole[metric])
    rank_macs = 1664 if name == "convnet" else 0  # of conv1, the dearest: nothing finer may be left to raise
    assert min(0.9 * limit, limit - rank_macs) <= reached[metric] <= limit
    assert sum(row.macs for row in learned.final_rows) == reached["macs"]
    assert sum(row.params for row in learned.final_rows) == reached["params"]
    steps = [data for kind, data in learned.recorder.events if kind == EventKind.STEP]
    assert [data["step"] for data in steps] == list(range(1, 7))
    assert all(data["cost"] <= limit for data in steps[-2:])  # ranks are held within the budget at the end
    assert all(a["mu"] < b["mu"] for a, b in pairwise(steps))
    fractions = [progress.fraction for progress in learned.recorder.progresses]
    assert fractions == sorted(fractions)
    assert fractions[-1] <= 1


def test_cost_and_budget_may_count_different_things(files: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    model, data = files["convnet"]
    for cost in ("params", {"macs": 1.0, "params": 10.0}):
        spec = quick(budget={"max_macs_fraction": 0.3}, cost=cost)
        learned = run_learn(tmp_path / str(cost), model, spec, data)
        whole, reached = sizes(learned, model, (2, 8, 8))
        assert reached["macs"] <= int(0.3 * whole["macs"])


def test_a_budget_below_the_least_size_fails_before_any_training(
    files: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    model, data = files["mlp"]
    least = 48 + 64 + 64 + 64 + 64 + 4 + (64 + 64 + 4)  # rank 1 everywhere, and the biases
    with pytest.raises(ProblemError) as caught:
        run_learn(tmp_path, model, quick(budget={"max_params": least - 1}), data)
    assert caught.value.code == ErrorCode.CONSTRAINT_UNREACHABLE
    assert str(least) in caught.value.detail
    assert f"{least / 7556:.4f}" in caught.value.detail
    learned = run_learn(tmp_path / "least", model, quick(budget={"max_params": least}), data)
    assert sizes(learned, model, (48,))[1]["params"] == least


def test_a_budget_that_needs_what_a_weight_is_computed_from_says_which_parameters_rules_can_name(
    tmp_path: Path,
) -> None:
    network = nn.Sequential(nn.utils.weight_norm(nn.Linear(40, 40)), nn.ReLU(), nn.Linear(40, 4))
    torch.jit.trace(network, torch.zeros(1, 40)).save(str(tmp_path / "model.pt"))
    asked = {"budget": {"max_params_fraction": 0.5}, "example_inputs": examples((40,))}
    with pytest.raises(ProblemError, match="parameter:") as caught:
        run_learn(tmp_path / "refused", tmp_path / "model.pt", quick(**asked))
    assert caught.value.code == ErrorCode.CONSTRAINT_UNREACHABLE
    assert caught.value.detail.endswith("compresses by itself: parameter:0.weight_v (40×40)")
    named = quick(**asked, layers=[{"match": "parameter:0.weight_v"}, {"match": "*"}])
    learned = run_learn(tmp_path / "named", tmp_path / "model.pt", named)
    assert "0.weight_v" in {row.layer for row in learned.final_rows if row.rank}


def test_fixed_ranks_need_no_budget(files: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    model, data = files["mlp"]
    rules = [{"match": "fc1", "rank": 5}, {"match": "fc2", "rank": 60}, {"match": "head", "keep": "dense"}]
    learned = run_learn(tmp_path, model, quick(layers=rules), data)
    assert {row.layer: (row.form, row.rank, row.reason) for row in learned.final_rows} == {
        "fc1": (Form.MATRIX, 5, ReasonCode.RANK_FIXED),
        "fc2": (Form.DENSE, None, ReasonCode.RANK_ABOVE_BREAK_EVEN),
        "head": (Form.DENSE, None, ReasonCode.KEPT_BY_RULE),
    }
    assert sizes(learned, model, (48,))[1]["params"] == 5 * (48 + 64) + 64 * 64 + 64 * 4 + 132


def test_bounds_of_ranks_are_kept(files: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    model, data = files["convnet"]
    terms = [{"reshape": "channel", "max_rank": 2}, {"reshape": "spatial", "min_rank": 3}]
    rules = [{"match": "conv2", "terms": terms}, {"match": "*", "min_rank": 2}]
    learned = run_learn(tmp_path, model, quick(budget={"max_params_fraction": 0.6}, layers=rules), data)
    ranks = {(row.layer, row.form): row.rank or 0 for row in learned.final_rows}
    assert ranks["conv2", Form.CHANNEL] <= 2
    assert ranks["conv2", Form.SPATIAL] >= 3
    assert (
        ranks["conv1", Form.CHANNEL] + ranks["conv1", Form.SPATIAL] >= 2 if ("conv1", Form.CHANNEL) in ranks else True
    )


def test_lambda_steers_without_a_budget(files: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    model, data = files["mlp"]
    reached = []
    for lam in (3.0, 30.0, 300.0):
        spec = quick(method={"lambda": lam, "mu": {"initial": 0.01, "steps": 3}})
        learned = run_learn(tmp_path / str(lam), model, spec, data)
        reached.append(sizes(learned, model, (48,))[1]["params"])
    assert reached == sorted(reached, reverse=True)
    assert reached[0] > reached[-1]


def test_a_lambda_that_compresses_nothing_is_said(files: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    model, data = files["mlp"]
    with pytest.raises(ProblemError) as caught:
        run_learn(tmp_path, model, quick(method={"lambda": 1e-9, "mu": {"initial": 1.0, "steps": 1}}), data)
    assert caught.value.code == ErrorCode.CONSTRAINT_UNREACHABLE
    assert "method.lambda" in caught.value.detail


def test_relative_errors_are_those_of_the_final_factors(files: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """‖W − ΣΘ‖ / ‖W‖ against the reference, where nothing was trained."""
    model, _ = files["convnet"]
    spec = quick(budget={"max_params_fraction": 0.5}, example_inputs=examples((2, 8, 8)))
    learned = run_learn(tmp_path, model, spec)
    weight = torch.jit.load(str(model)).fc.weight.detach().double()
    (row,) = [row for row in learned.final_rows if row.layer == "fc"]
    energies = torch.linalg.svdvals(weight).square()
    assert row.relative_error == pytest.approx(float((energies[row.rank :].sum() / energies.sum()).sqrt()), rel=1e-4)


def test_a_rule_that_matches_nothing_is_a_warning(files: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    model, data = files["mlp"]
    spec = quick(budget={"max_params_fraction": 0.5}, layers=[{"match": "encoder.*"}, {"match": "*"}])
    learned = run_learn(tmp_path, model, spec, data)
    warnings = [data for kind, data in learned.recorder.events if kind == EventKind.WARNING]
    assert [each["code"] for each in warnings] == ["RULE_MATCHED_NOTHING"]
    assert [each["code"] for each in learned.plan["warnings"]] == ["RULE_MATCHED_NOTHING"]


def test_the_resolved_spec_is_a_spec_without_auto(files: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    model, data = files["mlp"]
    spec = quick(budget={"max_params_fraction": 0.5}, training={"optimizer": {"lr": "auto"}}, device="auto")
    learned = run_learn(tmp_path, model, spec, data)
    resolved = learned.recorder.specs[-1]
    assert resolved["method"]["mu"]["growth"] == pytest.approx(700 ** (1 / 2))
    assert resolved["objective"]["loss"] == "cross_entropy"
    assert resolved["device"] in {"cpu", "cuda"}
    for path in (("method", "mu", "initial"), ("training", "optimizer", "lr"), ("fine_tune", "epochs")):
        place: Any = resolved
        for name in path:
            place = place[name]
        assert isinstance(place, (int, float)), path
    assert learned.plan["resolved"] == resolved
