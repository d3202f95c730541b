"""Choices of `training` and `fine_tune` in whole runs: early stop, rates, statistics, decay; and their resumes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_jobs import ConvNet, Learned, Mlp, quick, run_learn, save_data, save_model

from service.contract.events import EventKind
from worker.checkpoint import read_checkpoint, write_checkpoint
from worker.engine.course import Course
from worker.engine.methods import factored, scoring
from worker.engine.observer import Saved

pytestmark = pytest.mark.usefixtures("plain_executor")


def steps_of(learned: Learned) -> list[dict[str, Any]]:
    return [dict(data) for kind, data in learned.recorder.events if kind == EventKind.STEP]


def job(folder: Path, net: Any = Mlp, shape: tuple[int, ...] = (20,)) -> tuple[Path, Path]:
    model = save_model(folder / "model.pt", net())
    return model, save_data(folder / "data.npz", model, shape, count=98)


def resumed(folder: Path, saved: Saved, position: int) -> Saved:
    return read_checkpoint(Path(write_checkpoint(saved, folder, position).path))


def test_a_settled_loop_ends_early_and_a_resumed_one_at_the_same_step(tmp_path: Path) -> None:
    model, data = job(tmp_path)
    spec = quick(
        method={"lambda": 40.0, "mu": {"steps": 12, "initial": 1.0, "growth": 3.0}},
        training={"early_stop": {"steps": 2, "distance": 1e-3}},
    )
    whole = run_learn(tmp_path / "whole", model, spec, data)
    made = steps_of(whole)
    assert 3 <= len(made) < 12
    assert [step["settled"] for step in made] == [False] * (len(made) - 1) + [True]
    assert whole.recorder.progresses[-1].fraction == 1
    for at in range(2, len(whole.recorder.checkpoints), 4):
        saved = resumed(tmp_path / "c", whole.recorder.checkpoints[at], at)
        again = run_learn(tmp_path / f"again{at}", model, spec, data, saved)
        assert again.plan["rows"] == whole.plan["rows"]
        assert all(torch.equal(tensor, again.state[name]) for name, tensor in whole.state.items())
    never = quick(**{**spec, "training": {**spec["training"], "early_stop": None}})
    assert len(steps_of(run_learn(tmp_path / "never", model, never, data))) == 12


def test_under_a_budget_steps_count_from_where_it_holds(tmp_path: Path) -> None:
    model, data = job(tmp_path)
    spec = quick(
        budget={"max_params_fraction": 0.6},
        method={"mu": {"steps": 10}},
        training={"early_stop": {"steps": 1, "distance": 1.0}},
    )
    learned = run_learn(tmp_path / "w", model, spec, data)
    assert len(steps_of(learned)) == 10, "of the last two steps the second is the first to leave the ranks alone"


def test_rates_of_steps_and_fine_tuning_follow_their_schedules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    real = Course.epoch

    def noted(course: Course, *args: Any, **options: Any) -> float:
        rates.extend(group["lr"] for group in course.optimizer.param_groups)
        return real(course, *args, **options)

    monkeypatch.setattr(Course, "epoch", noted)
    model, data = job(tmp_path)
    exponential = {"type": "exponential", "factor": 0.5}
    spec = quick(
        budget={"max_params_fraction": 0.6},
        method={"mu": {"steps": 2, "initial": 0.1, "growth": 2.0}},
        training={"epochs_per_step": 2, "schedule": {**exponential, "restart": True}},
        fine_tune={"epochs": 3, "lr": 0.02, "schedule": exponential},
    )
    learned = run_learn(tmp_path / "w", model, spec, data)
    assert rates == pytest.approx([0.05, 0.025, 0.05, 0.025, 0.02, 0.01, 0.005])
    assert learned.plan["notes"]["fine_tune_learning_rate"] == 0.02


@pytest.mark.parametrize("epochs", [0, 2])
def test_statistics_are_kept_where_they_score_better(
    epochs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = job(tmp_path, ConvNet, (2, 8, 8))
    made: dict[str, Learned] = {}
    for choice in ("keep", "reestimate"):
        spec = quick(
            budget={"max_macs_fraction": 0.5}, training={"batch_norm": choice}, fine_tune={"epochs": epochs, "lr": 1e-6}
        )
        made[choice] = run_learn(tmp_path / choice, model, spec, data)
    assert not torch.equal(made["keep"].state["bn.running_mean"], made["reestimate"].state["bn.running_mean"])

    scores = iter(range(100))
    monkeypatch.setattr(scoring, "select_score", lambda *_: float(next(scores)))  # what comes later is worse
    monkeypatch.setattr(factored, "select_score", lambda *_: float(next(scores)))
    spec = quick(budget={"max_macs_fraction": 0.5}, fine_tune={"epochs": epochs, "lr": 1e-6, "keep": "best"})
    worse = run_learn(tmp_path / "worse", model, spec, data)
    learned = worse.after_steps[-1].tensors["network.bn.running_mean"]
    assert torch.equal(worse.state["bn.running_mean"], learned)


def test_fine_tuning_runs_to_its_end_and_keeps_its_best_iterate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Θ may score better than every epoch at a high rate, and worse than the schedule's end."""
    model, data = job(tmp_path)
    scores = iter([0.5, *([1.0] * 10), 0.4, 0.6])
    monkeypatch.setattr(scoring, "select_score", lambda *_: next(scores))
    monkeypatch.setattr(factored, "select_score", lambda *_: next(scores))
    spec = quick(budget={"max_params_fraction": 0.5}, fine_tune={"epochs": 12, "lr": 0.01, "keep": "best"})
    notes = run_learn(tmp_path / "w", model, spec, data).plan["notes"]
    assert (notes["fine_tune_epochs"], notes["fine_tune_best_epoch"]) == (12, 11)


def test_decay_of_products_in_a_run(tmp_path: Path) -> None:
    model, data = job(tmp_path)
    norms = []
    for decay, on in ((0.0, "factors"), (0.05, "factors"), (0.05, "product")):
        spec = quick(
            budget={"max_params_fraction": 0.6},
            training={"optimizer": {"weight_decay": decay, "weight_decay_on": on}},
            fine_tune={"epochs": 4},
        )
        state = run_learn(tmp_path / f"{decay}{on}", model, spec, data).state
        chains = {name.rpartition(".")[0].rpartition(".")[0] for name in state if "__factors" in name}
        pairs = [(state[f"{chain}.1.weight"], state[f"{chain}.0.weight"]) for chain in chains]
        norms.append(sum(float((left @ right).square().sum()) for left, right in pairs))
    assert len(set(norms)) == 3
    assert max(norms[1:]) < norms[0]
