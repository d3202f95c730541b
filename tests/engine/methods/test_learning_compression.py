"""What the loop tells of itself: errors, multipliers, rows, and the data that it may look at."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_jobs import Learned, Mlp, quick, run_learn, save_data, save_model

from service.contract.events import EventKind
from service.contract.plan import Form
from worker.engine.selection.shrinking import falling_limit

NAMES = ["fc1", "fc2", "head"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("loop")
    model = save_model(folder / "model.pt", Mlp(48, 64))
    return model, save_data(folder / "data.npz", model, (48,), parts=("val_", "test_"))


def learn(files: tuple[Path, Path], folder: Path, **changes: Any) -> Learned:
    spec = quick(**{"budget": {"max_params_fraction": 0.4}, "fine_tune": {"epochs": 0}, **changes})
    return run_learn(folder, files[0], spec, files[1])


def parts_of(learned: Learned, step: int, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W, Θ and β of a layer after a step."""
    tensors = learned.after_steps[step].tensors
    theta = tensors[f"theta.{index}.0.left"] @ tensors[f"theta.{index}.0.right"]
    return tensors[f"network.{NAMES[index]}.weight"].double(), theta, tensors[f"multiplier.{index}"].double()


@pytest.mark.parametrize("multipliers", [False, True])
def test_relative_errors_are_distances_from_w_to_theta(
    multipliers: bool, files: tuple[Path, Path], tmp_path: Path
) -> None:
    learned = learn(files, tmp_path, method={"multipliers": multipliers, "mu": {"steps": 4}})
    for row in learned.recorder.rank_rows:
        if row.form == Form.DENSE:
            continue
        weight, theta, _ = parts_of(learned, min(row.step, 4) - 1, NAMES.index(row.layer))
        assert row.relative_error == pytest.approx(float((weight - theta).norm() / weight.norm()), rel=1e-4)


def test_multipliers_are_updated_as_written(files: tuple[Path, Path], tmp_path: Path) -> None:
    """β ← β − μ(W − Θ), from zero; a layer that is dense by now has none."""
    learned = learn(files, tmp_path, method={"mu": {"steps": 4}})
    steps = [data for kind, data in learned.recorder.events if kind == EventKind.STEP]
    for index in range(3):
        beta = torch.zeros((), dtype=torch.float64)
        for step, data in enumerate(steps):
            weight, theta, found = parts_of(learned, step, index)
            dense = learned.after_steps[step].state["projections"][index]["dense"]
            beta = beta * 0 if dense else beta - data["mu"] * (weight - theta)
            assert torch.allclose(found, beta.expand_as(found), atol=1e-5 * (1 + float(beta.abs().max())))
    without = learn(files, tmp_path / "without", method={"multipliers": False, "mu": {"steps": 2}})
    assert all(not parts_of(without, step, index)[2].any() for step in range(2) for index in range(3))


def test_mu_and_lambda_follow_the_schedule(files: tuple[Path, Path], tmp_path: Path) -> None:
    spec = {"method": {"lambda": 30.0, "mu": {"initial": 0.01, "growth": 1.5, "steps": 4}}, "budget": None}
    learned = learn(files, tmp_path, **spec)
    steps = [data for kind, data in learned.recorder.events if kind == EventKind.STEP]
    assert [data["mu"] for data in steps] == pytest.approx([0.01 * 1.5**step for step in range(4)])
    assert [data["lambda"] for data in steps] == pytest.approx([30.0] * 4)


def test_the_budget_falls_to_its_end_and_no_step_is_above_it(files: tuple[Path, Path], tmp_path: Path) -> None:
    learned = learn(files, tmp_path, method={"mu": {"steps": 10}})
    costs = [data["cost"] for kind, data in learned.recorder.events if kind == EventKind.STEP]
    limit, dense = learned.plan["limit"], sum(each.numel() for each in torch.jit.load(files[0]).parameters())
    allowed = [falling_limit(limit, dense, (step + 1) / 10) for step in range(10)]
    assert allowed[0] > allowed[4] > allowed[7] == allowed[9] == limit
    assert all(cost <= most for cost, most in zip(costs, allowed, strict=True))
    assert all(after <= before for before, after in pairwise(costs[3:-1])), "from there on units only go"
    assert max(costs[:3]) > limit


def test_the_distance_falls_as_mu_grows(files: tuple[Path, Path], tmp_path: Path) -> None:
    learned = learn(files, tmp_path, method={"mu": {"steps": 8}}, training={"epochs_per_step": 2})
    distances = [data["distance"] for kind, data in learned.recorder.events if kind == EventKind.STEP]
    assert distances[-1] < 0.2 * max(distances)


def test_rows_are_told_when_they_change_and_all_at_the_end(files: tuple[Path, Path], tmp_path: Path) -> None:
    learned = learn(files, tmp_path, method={"mu": {"steps": 6}})
    rows = learned.recorder.rank_rows
    last: dict[tuple[str, int], tuple[Form, int | None]] = {}
    for row in rows:
        if not row.chosen and row.step > 1:
            assert last.get((row.layer, row.term)) != (row.form, row.rank)
        last[row.layer, row.term] = (row.form, row.rank)
    assert {row.layer for row in rows if row.step == 1} == set(NAMES)
    assert [row.layer for row in learned.final_rows] == NAMES
    assert {row.step for row in learned.final_rows} == {7}


def test_nothing_is_chosen_on_the_report_part(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Other test data, the same network: not one bit of what is trained or selected depends on it."""
    model, data = files
    arrays = dict(np.load(data))
    other = tmp_path / "other.npz"
    np.savez(
        other, **{**arrays, "test_inputs": arrays["test_inputs"] * -3, "test_targets": arrays["test_targets"][::-1]}
    )
    spec = quick(budget={"max_params_fraction": 0.4}, fine_tune={"epochs": 3}, training={"optimizer": {"lr": "auto"}})
    torch._C._set_graph_executor_optimize(False)
    try:
        one = run_learn(tmp_path / "one", model, spec, data)
        two = run_learn(tmp_path / "two", model, spec, other)
    finally:
        torch._C._set_graph_executor_optimize(True)
    assert one.plan["recipe"] == two.plan["recipe"]
    assert all(torch.equal(tensor, two.state[name]) for name, tensor in one.state.items())


def test_the_best_iterate_on_the_select_part_is_kept(files: tuple[Path, Path], tmp_path: Path) -> None:
    learned = learn(files, tmp_path, fine_tune={"epochs": 6}, training={"optimizer": {"lr": 0.5}})
    scores = [data["value"] for kind, data in learned.recorder.events if kind == EventKind.METRIC]
    best = learned.plan["notes"]["fine_tune_best_epoch"]
    assert best == 0 or scores[best - 1] == min(scores)
    saved = learned.recorder.checkpoints[-1]
    assert all(torch.equal(saved.tensors[f"best.{name}"], tensor) for name, tensor in learned.state.items())
