"""Scores of a part, and whether the intervals cover what they say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_jobs import Mlp, save_data, save_model
from torch.nn import functional as F

from service.contract.errors import ErrorCode, ProblemError
from service.contract.spec import DataSpec
from service.contract.spec import Objective as ObjectiveSpec
from worker.engine import evaluation
from worker.engine.data import Dataset
from worker.engine.evaluation import evaluate, measure_latency, paired_difference
from worker.engine.network.load import load_model
from worker.engine.objective import Objective
from worker.engine.teacher import Teacher

CPU = torch.device("cpu")


@pytest.fixture
def scored(tmp_path: Path) -> tuple[torch.jit.ScriptModule, Dataset]:
    model = save_model(tmp_path / "model.pt", Mlp())
    data = save_data(tmp_path / "data.npz", model, count=1500, parts=("val_", "test_"))
    return load_model(model), Dataset(dict(np.load(data)), DataSpec(), 0, ["x"])


def test_scores_are_those_of_the_whole_part(scored: tuple[torch.jit.ScriptModule, Dataset]) -> None:
    module, dataset = scored
    objective = Objective(ObjectiveSpec(loss="cross_entropy", distillation=0.0))
    x, y = dataset.part("report").inputs[0], dataset.part("report").targets[0]
    with torch.no_grad():
        outputs = module(torch.from_numpy(x))
    module.train()
    scores = evaluate(module, dataset, "report", objective, None, CPU)
    assert module.training
    assert len(scores.losses) == 500  # more than one batch
    assert scores.metric == 1.0
    assert scores.loss == pytest.approx(float(F.cross_entropy(outputs, torch.from_numpy(y))), rel=1e-5)
    assert scores.objective == pytest.approx(scores.loss, rel=1e-5)


def test_batches_that_do_not_fit_are_halved(
    scored: tuple[torch.jit.ScriptModule, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, dataset = scored
    teacher = Teacher(module, dataset, CPU)
    objective = Objective(ObjectiveSpec(loss="cross_entropy"))
    whole = evaluate(module, dataset, "report", objective, teacher, CPU)
    sizes = []

    def small(net: torch.jit.ScriptModule, inputs: Any) -> tuple[torch.Tensor, ...]:
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > 100:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return (net(*inputs),)

    monkeypatch.setattr(evaluation, "call_nested", small)
    halved = evaluate(module, dataset, "report", objective, teacher, CPU)
    assert sizes[:3] == [256, 128, 64]
    np.testing.assert_allclose(halved.losses, whole.losses, rtol=1e-5)
    assert halved.objective == pytest.approx(whole.objective, rel=1e-5)


def test_samples_that_are_left_out_are_in_no_score(scored: tuple[torch.jit.ScriptModule, Dataset]) -> None:
    module, dataset = scored
    part = dataset.part("report")
    kept = part.targets[0].copy()
    kept[::3] = -100
    arrays = {"inputs": part.inputs[0], "targets": kept}
    spec = DataSpec()
    made = Dataset(arrays | {f"test_{k}": v for k, v in arrays.items()}, spec, 0, ["x"])
    objective = Objective(ObjectiveSpec(loss="cross_entropy", distillation=0.0))
    scores = evaluate(module, made, "report", objective, None, CPU)
    assert len(scores.losses) == len(scores.metrics) == 500 - 167
    assert scores.metric == 1.0  # and not the 0.666 that counting them as wrong would give
    arrays["targets"] = np.full(500, -100)
    nothing = Dataset(arrays | {f"test_{k}": v for k, v in arrays.items()}, spec, 0, ["x"])
    with pytest.raises(ProblemError) as caught:
        evaluate(module, nothing, "report", objective, None, CPU)
    assert caught.value.code == ErrorCode.DATASET_INVALID


def test_the_teachers_answers_are_kept_and_are_the_references(
    scored: tuple[torch.jit.ScriptModule, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, dataset = scored
    rows = np.array([7, 3, 400])
    batch = dataset.rows("train", rows, CPU)
    with torch.no_grad():
        wanted = module.eval()(batch.inputs[0])
    kept = Teacher(module, dataset, CPU).outputs("train", rows, batch)[0]
    assert torch.allclose(kept, wanted, atol=1e-6)
    monkeypatch.setattr("worker.engine.teacher.CACHE_BYTES_MAX", 0)
    assert torch.allclose(Teacher(module, dataset, CPU).outputs("train", rows, batch)[0], wanted, atol=1e-6)


def test_the_teacher_halves_what_does_not_fit(
    scored: tuple[torch.jit.ScriptModule, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, dataset = scored
    rows = np.arange(100)
    batch = dataset.rows("train", rows, CPU)
    wanted = Teacher(module, dataset, CPU).outputs("train", rows, batch)[0]

    def small(net: torch.jit.ScriptModule, inputs: Any) -> tuple[torch.Tensor, ...]:
        if len(inputs[0]) > 130:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (net(*inputs),)

    monkeypatch.setattr("worker.engine.teacher.call", small)
    assert torch.allclose(Teacher(module, dataset, CPU).outputs("train", rows, batch)[0], wanted, atol=1e-6)


def coverage(draw: Any, truth: float, repeats: int = 2000) -> float:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(repeats):
        made = paired_difference("x", *draw(generator))
        assert made.low <= made.difference <= made.high
        hits += made.low <= truth <= made.high
    return hits / repeats


@pytest.mark.parametrize("count", [20, 200])
@pytest.mark.parametrize(("lost", "gained"), [(0.02, 0.02), (0.10, 0.02), (0.3, 0.1)])
def test_intervals_of_accuracy_cover_the_truth(count: int, lost: float, gained: float) -> None:
    def draw(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        u = generator.random(count)
        reference = (u < 0.5 + lost).astype(float)  # right, then wrong: lost; wrong, then right: gained
        compressed = ((u < 0.5) | (u > 1 - gained)).astype(float)
        return compressed, reference

    assert coverage(draw, gained - lost) >= 0.93


@pytest.mark.parametrize("count", [5, 50])
def test_intervals_of_losses_cover_the_truth(count: int) -> None:
    def draw(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        common = generator.normal(3.0, 5.0, count)
        return common + generator.normal(0.2, 0.5, count), common

    assert 0.935 <= coverage(draw, 0.2) <= 0.965


def test_agresti_min_by_hand() -> None:
    compressed = np.array([1.0] * 90 + [0] * 10)
    reference = np.array([1.0] * 88 + [0] * 2 + [1] * 6 + [0] * 4)
    made = paired_difference("accuracy", compressed, reference)  # 2 gained, 6 lost, of 100
    centre = (2.5 - 6.5) / 102
    half = 1.959964 * np.sqrt(9.0 - 16 / 102) / 102
    assert made.difference == pytest.approx(-0.04)
    assert (made.low, made.high) == (pytest.approx(centre - half, rel=1e-5), pytest.approx(centre + half, rel=1e-5))
    assert (made.samples, made.confidence) == (100, 0.95)


def test_equal_answers_leave_an_interval_that_is_no_point() -> None:
    same = np.ones(50)
    made = paired_difference("accuracy", same, same)
    assert made.difference == 0
    assert -0.06 < made.low < 0 < made.high < 0.06


def test_latency_is_measured_in_turn(
    scored: tuple[torch.jit.ScriptModule, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "LATENCY_SECONDS", 0.05)
    module, dataset = scored
    inputs = dataset.rows("train", np.arange(3), CPU).inputs
    found = measure_latency([module, module], inputs, 16)
    assert [(each.batch_size, each.repeats >= 5, each.median_ms > 0) for each in found] == [(16, True, True)] * 2
