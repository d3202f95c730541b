"""Losses and scores against plain PyTorch, and what is refused before anything is trained."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from service.contract.errors import ErrorCode, ProblemError
from service.contract.spec import DataSpec
from service.contract.spec import Objective as ObjectiveSpec
from worker.engine.data import Dataset
from worker.engine.objective import Objective, pair_targets, resolve_loss


def objective(**spec: Any) -> Objective:
    return Objective(ObjectiveSpec.model_validate({"loss": "cross_entropy", **spec}))


def data(targets: np.ndarray | None, **more: np.ndarray) -> Dataset:
    arrays = {"inputs": np.zeros((20, 3), np.float32), **more}
    if targets is not None:
        arrays["targets"] = targets
    return Dataset(arrays, DataSpec(), 0, ["x"])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_cross_entropy() -> None:
    y, target = randn(9, 5), torch.arange(9) % 5
    made = objective(distillation=0.0)
    assert made.loss([y], [target], None) == pytest.approx(float(F.cross_entropy(y, target)))
    losses, metrics = made.scores([y], [target], None)[:2]
    assert torch.allclose(losses, F.cross_entropy(y, target, reduction="none").double())
    assert metrics.tolist() == [float(right) for right in y.argmax(1) == target]
    assert losses.dtype == metrics.dtype == torch.float64
    assert not made.needs_teacher
    assert made.metric.name == "accuracy"


@pytest.mark.parametrize(("class_dim", "shape"), [(1, (6, 5, 4, 3)), (-1, (6, 4, 3, 5)), (2, (6, 4, 5, 3))])
def test_classes_along_any_axis(class_dim: int, shape: tuple[int, ...]) -> None:
    y = randn(*shape)
    target = torch.randint(0, 5, (6, *[s for axis, s in enumerate(shape) if axis not in {0, class_dim % 4}]))
    made = objective(class_dim=class_dim, distillation=0.0)
    made.check([y], data(np.zeros((20, *target.shape[1:]), np.int64)))
    logits = y.movedim(class_dim, 1)
    assert float(made.loss([y], [target], None)) == pytest.approx(float(F.cross_entropy(logits, target)))
    losses, metrics = made.scores([y], [target], None)[:2]
    assert torch.allclose(losses, F.cross_entropy(logits, target, reduction="none").flatten(1).mean(1).double())
    assert torch.allclose(metrics, (logits.argmax(1) == target).double().flatten(1).mean(1))
    teacher = randn(*shape, seed=1)
    t = 3.0
    wanted = t**2 * F.kl_div(
        F.log_softmax(logits / t, 1).movedim(1, -1).reshape(-1, 5),
        F.softmax(teacher.movedim(class_dim, 1) / t, 1).movedim(1, -1).reshape(-1, 5),
        reduction="batchmean",
    )
    found = objective(class_dim=class_dim, distillation=1.0, temperature=t).loss([y], [target], [teacher])
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)


def test_distillation_is_mixed_with_the_task() -> None:
    y, teacher, target = randn(9, 5), randn(9, 5, seed=1), torch.arange(9) % 5
    made = objective(distillation=0.7, temperature=2.0)
    kl = F.kl_div(F.log_softmax(y / 2, 1), F.softmax(teacher / 2, 1), reduction="batchmean")
    wanted = 0.3 * F.cross_entropy(y, target) + 0.7 * 4 * kl
    assert float(made.loss([y], [target], [teacher])) == pytest.approx(float(wanted), rel=1e-5)
    assert made.needs_teacher
    numbers = objective(loss="mse", distillation=0.25)
    real = randn(9, 5, seed=2)
    wanted = 0.75 * F.mse_loss(y, real) + 0.25 * F.mse_loss(y, teacher)
    assert float(numbers.loss([y], [real], [teacher])) == pytest.approx(float(wanted), rel=1e-5)


def test_mse_and_its_scores() -> None:
    y, target = randn(9, 1), randn(9, seed=1)
    made = objective(loss="mse", distillation=0.0)
    made.check([y], data(np.zeros(20, np.float32)))
    assert float(made.loss([y], [target], None)) == pytest.approx(float(F.mse_loss(y[:, 0], target)))
    losses, metrics = made.scores([y], [target], None)[:2]
    assert torch.allclose(losses, (y[:, 0] - target).square().double())
    assert torch.equal(losses, metrics)


def test_without_targets_the_references_outputs_are_matched() -> None:
    y, teacher = randn(9, 5), randn(9, 5, seed=1)
    made = objective(loss="distillation")
    relative = (y - teacher).square().mean(1) / teacher.square().mean()
    assert float(made.loss([y], [], [teacher])) == pytest.approx(float(relative.mean()), rel=1e-5)
    assert torch.allclose(made.scores([y], [], [teacher])[0], relative.double(), rtol=1e-5)
    # Outputs that are whole numbers cannot be matched by a gradient; the others are.
    both = made.loss([y, y.argmax(1)], [], [teacher, teacher.argmax(1)])
    assert float(both) == pytest.approx(float(relative.mean()), rel=1e-5)
    made.check([y, y.argmax(1)], data(None))
    made.check([y], data(np.zeros((20, 7), np.float32)))  # targets that are there are not looked at


def test_ignored_positions_and_samples_count_for_nothing() -> None:
    y, target = randn(4, 5, 3), torch.tensor([[0, 1, -1], [-1, -1, -1], [2, 3, 4], [-1, 0, -1]])
    made = objective(ignore_index=-1, distillation=0.0)
    made.check([y], data(np.where(np.arange(60).reshape(20, 3) % 4, 1, -1)))
    assert float(made.loss([y], [target], None)) == pytest.approx(float(F.cross_entropy(y, target, ignore_index=-1)))
    losses, metrics = made.scores([y], [target], None)[:2]
    assert losses.isnan().tolist() == metrics.isnan().tolist() == [False, True, False, False]
    assert float(losses[0]) == pytest.approx(float(F.cross_entropy(y[:1, :, :2], target[:1, :2])), rel=1e-5)
    assert float(metrics[3]) == float(y[3, :, 1].argmax() == 0)
    nothing = made.loss([y.requires_grad_()], [torch.full((4, 3), -1)], None)
    nothing.backward()
    assert float(nothing.detach()) == 0
    assert torch.equal(y.grad, torch.zeros_like(y))


def test_several_outputs_by_name() -> None:
    names = ["total", "product"]
    assert pair_targets(["targets.product", "targets.total"], "targets", names) == [1, 0]
    assert pair_targets(["targets"], "targets", names) is None
    with pytest.raises(ProblemError, match=r"targets\.sum name no output.*total, product"):
        pair_targets(["targets.sum"], "targets", names)
    made = Objective(ObjectiveSpec(loss="mse", distillation=0.0), [1, 0])
    a, b = randn(4, 2), randn(4, 3, seed=1)
    assert float(made.loss([a, b], [b, a], None)) == 0.0


def test_auto_is_resolved_by_the_targets() -> None:
    auto = ObjectiveSpec()
    assert resolve_loss(auto, data(np.arange(20))) == "cross_entropy"
    assert resolve_loss(auto, data(np.arange(20) > 3)) == "cross_entropy"
    assert resolve_loss(auto, data(np.arange(20.0))) == "mse"
    assert resolve_loss(auto, data(None)) == "distillation"
    assert resolve_loss(auto, None) == "distillation"
    assert resolve_loss(ObjectiveSpec(loss="distillation"), data(np.arange(20))) == "distillation"
    assert resolve_loss(ObjectiveSpec(loss="mse"), data(np.arange(20))) == "mse"
    for spec, made in (
        (ObjectiveSpec(loss="mse"), data(None)),
        (ObjectiveSpec(loss="cross_entropy"), data(np.ones(20))),
    ):
        with pytest.raises(ProblemError) as caught:
            resolve_loss(spec, made)
        assert caught.value.code == ErrorCode.DATASET_INVALID


CHECKS = [
    ({}, randn(2, 5), np.full(20, 5), ErrorCode.DATASET_INVALID, "class 5; the network has 5 classes"),
    ({}, randn(2, 5), np.full(20, -2), ErrorCode.DATASET_INVALID, "class -2"),
    ({}, randn(2, 5), np.zeros((20, 3), np.int64), ErrorCode.INPUT_SHAPE_MISMATCH, "(20, 3)"),
    ({}, randn(2), np.zeros(20, np.int64), ErrorCode.INPUT_SHAPE_MISMATCH, "class_dim is 1"),
    ({"class_dim": 0}, randn(2, 5), np.zeros(20, np.int64), ErrorCode.INPUT_SHAPE_MISMATCH, "class_dim is 0"),
    ({"class_dim": -2}, randn(2, 5), np.zeros(20, np.int64), ErrorCode.INPUT_SHAPE_MISMATCH, "class_dim is -2"),
    ({}, torch.zeros(2, 5, dtype=torch.long), np.zeros(20, np.int64), ErrorCode.MODEL_UNSUPPORTED, "whole numbers"),
    ({"loss": "mse"}, randn(2, 5), np.zeros((20, 4)), ErrorCode.INPUT_SHAPE_MISMATCH, "(20, 4)"),
]


@pytest.mark.parametrize(("spec", "output", "targets", "code", "words"), CHECKS)
def test_targets_that_do_not_fit_are_refused(
    spec: dict[str, Any], output: Tensor, targets: np.ndarray, code: ErrorCode, words: str
) -> None:
    with pytest.raises(ProblemError) as caught:
        objective(**spec).check([output], data(targets))
    assert caught.value.code == code
    assert words in caught.value.detail


def test_more_targets_than_outputs_are_refused() -> None:
    arrays = {"inputs": np.zeros((20, 3)), "targets.a": np.zeros(20, np.int64), "targets.b": np.zeros(20, np.int64)}
    with pytest.raises(ProblemError) as caught:
        objective().check([randn(2, 5)], Dataset(arrays, DataSpec(), 0, ["x"]))
    assert caught.value.code == ErrorCode.INPUT_SHAPE_MISMATCH
